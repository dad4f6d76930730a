"""Request and response bodies. Unknown fields are ignored, `null` means the default; see `unsupported` for the rest."""
