"""What the servers of pages have in common: who may use them, where they listen, and how a page is sealed."""
