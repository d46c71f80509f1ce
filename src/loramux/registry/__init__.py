"""Adapters of many contributors: stored by content, named by tenants, checked before anything is kept."""
