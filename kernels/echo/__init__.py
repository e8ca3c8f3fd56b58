"""A model that computes nothing and notices everything: KV hashes the prefix, tokens hash the KV. No torch."""
