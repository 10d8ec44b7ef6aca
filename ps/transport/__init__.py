"""How frames and calls reach the server: carriers, admission, authentication, limits on peers."""
