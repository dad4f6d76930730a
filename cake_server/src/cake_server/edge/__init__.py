"""What stands before the routes: who may call, how much, and a line in the log for each."""
