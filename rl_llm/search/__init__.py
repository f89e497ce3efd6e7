"""Which weights? Forecasts, and searches over reward mixtures and any other knob."""
