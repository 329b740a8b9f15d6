// What every library has, compiled together: reading the headers of each file takes longer than compiling it.
#include "forward.cpp"
#include "lists.cpp"
#include "measure.cpp"
#include "pool.cpp"
#include "product.cpp"
#include "scores.cpp"
#include "variant.cpp"
