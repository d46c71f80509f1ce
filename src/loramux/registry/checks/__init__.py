"""Upload checks: what is refused, before anything is stored."""
