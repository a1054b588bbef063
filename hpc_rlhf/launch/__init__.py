"""Login node: a spec becomes a plan, text and jobs. Never imports torch."""
