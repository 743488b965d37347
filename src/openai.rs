//! What we understand of OpenAI's API, and what we pass through.
//!
//! Bodies are read as bytes: one borrowed walk finds the few members that routing and accounting need, and
//! whatever is not changed keeps its bytes. Nothing here owns a socket, a task or a clock.

pub mod body;
pub mod call;
pub mod conversation;
pub mod encoding;
pub mod endpoint;
pub mod error;
pub mod json;
pub mod query;
pub mod rewrite;
pub mod sse;
pub mod stream;
pub mod text;
pub mod tokenizer;

pub mod usage;

pub use body::BodyReader;
pub use call::{Call, Needs};
pub use endpoint::Endpoint;
pub use error::ApiError;
pub use rewrite::Change;
pub use stream::StreamReader;
pub use usage::Reported;
