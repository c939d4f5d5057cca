"""Training of the model that ships with Caravan. Nothing that serves imports it."""
