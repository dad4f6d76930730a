"""Messages between nodes: their types, their encoding, their bodies."""
