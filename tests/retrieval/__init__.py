"""Retrieval: profiles, indexes, ranking, persistence, and what is done with the hits."""
