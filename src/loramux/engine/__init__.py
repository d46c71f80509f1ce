"""Many tenants in one batch: requests with no adapter, one, a weighted mix or a routed mixture."""
