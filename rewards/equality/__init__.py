"""Is a parsed answer the gold?"""
