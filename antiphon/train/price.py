"""x"""
def show(*a): pass
