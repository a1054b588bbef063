"""The stages: the ``run`` of each reads top to bottom, as the numbered steps of its method."""
