"""Loading, adapting, averaging and exporting models, whole or sharded."""
