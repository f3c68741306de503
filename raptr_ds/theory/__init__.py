"""The paper's theory, measured on small networks."""
