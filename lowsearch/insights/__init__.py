"""The question of "Beyond MACs" (arXiv 2603.26551) on a user's own device: where do MACs and time part, and which choices are to blame?"""
