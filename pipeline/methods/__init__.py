"""How the student is trained: one module per ``[train] method``, all behind `pipeline.methods.method.Method`."""
