"""A Cake model plugin: a recurrent toy in plain Python."""
