"""One file per group of routes; each has `router() -> APIRouter`, and `app.py` lists them."""
