"""The configuration of a whole run: its sections put together, and the checks that span them."""
