"""Stock clients of OpenAI's protocols, unmodified, against a running server; `make conformance` runs them."""
