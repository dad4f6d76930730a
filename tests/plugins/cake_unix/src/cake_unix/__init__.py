"""A Cake transport plugin: messages over Unix domain sockets."""
