"""What the user asked for: YAML to JobSpec, or every error in it with line and column."""
