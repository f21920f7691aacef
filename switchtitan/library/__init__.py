"""The methods for a training loop of your own: what `switchtitan.apply` returns."""
