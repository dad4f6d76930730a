"""The cluster as the master sees it: its nodes found, measured, assigned, connected and replaced."""
