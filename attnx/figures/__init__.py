"""Pictures of maps: `picture` draws them, `sheets` arranges them, and other modules write the commands' files."""
