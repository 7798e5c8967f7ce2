"""Device models: what a described device achieves, each rate with the limit that binds it."""
