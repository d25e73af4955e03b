"""Operations that torch has only as several passes, in C++, each beside the plain torch that defines it."""
