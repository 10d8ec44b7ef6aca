"""``ParameterServerOptimizer`` and its parts."""
