"""Changes of the database's schema, in order; run by `loramux.registry.schema` when a registry is opened."""
