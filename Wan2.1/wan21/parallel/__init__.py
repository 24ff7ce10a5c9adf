"""One video made by several processes: who they are, who holds which tokens, and how they reach each other's."""
