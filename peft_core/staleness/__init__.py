"""How far the code has moved on since an adapter was trained."""
