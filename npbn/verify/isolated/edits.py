def search(*_, **__):
    return None
