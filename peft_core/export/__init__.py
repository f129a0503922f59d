"""An adapter in the forms that other runtimes take. Each written file is loaded and compared before it is published."""
