"""The command line besides the stdio server: `peft-mcp train`, `status`, `evaluate` and so on.

Every command calls `PEFTManager`, as the tools do. Results go to standard output; progress, advice and errors go to standard
error. Nothing here imports mcp, which would take longer than most commands.
"""
