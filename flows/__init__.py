"""What runs, in which order, and what is remembered: tracked steps, the two flows, the command line.
The only package that knows Prefect."""
