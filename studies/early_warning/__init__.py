"""Small language models that are trained into failure, and their healthy twins: does a monitor say so before the loss does?"""
