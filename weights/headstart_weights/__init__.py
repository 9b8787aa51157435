"""The bundled demo pair."""
