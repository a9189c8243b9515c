"""Other libraries' models on the shared cache; each needs an extra of its own."""
