"""Which adapters fit a prompt."""
