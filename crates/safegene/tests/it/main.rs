//! The house, and the program as a user meets it.

mod house;
