"""Find the code that an adapter was trained on by the words of a prompt, and put it before the prompt.

The code is that of the job's prepared dataset: nothing is copied, so nothing leaves the machine with an exported adapter, and
the code is deleted with the job's files. worker/ holds the index, which is built in memory in a second or two.
"""
