"""CoLA: LLaMA whose linear layers have a bottleneck with a nonlinearity."""
