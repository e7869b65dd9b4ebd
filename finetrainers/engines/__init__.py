"""How a step is spread over processes: one file an engine, one small contract."""
