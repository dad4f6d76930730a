"""The command line: `cake`, and `cake-cli` and `cake-split-model` for the seed's users.

Each command is a module that imports what it needs when it runs, so that `cake --help` stays light.
"""
