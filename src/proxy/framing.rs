//! What hyper lets pass, and a proxy must not: requests that another server could read otherwise than we do.

use http::{HeaderMap, Method, Request, StatusCode, Version, header};

use crate::openai::ApiError;

/// Why a request is refused before anything of it is read, if it is.
pub fn refusal<B>(request: &Request<B>) -> Option<ApiError> {
    let refused = |status, why: &str| Some(ApiError::new(status, "invalid_request_error", why));
    if matches!(*request.method(), Method::CONNECT | Method::TRACE) {
        return refused(StatusCode::METHOD_NOT_ALLOWED, "CONNECT and TRACE are not served");
    }
    if !request.uri().path().starts_with('/') {
        return refused(StatusCode::BAD_REQUEST, "the request's target has no path");
    }
    // RFC 9113, 8.3.1. What stands before the `@` looks like a host to whoever reads carelessly.
    if request.uri().authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return refused(StatusCode::BAD_REQUEST, "the request's target names a user");
    }
    if request.version() >= Version::HTTP_2 {
        return None;
    }
    let headers = request.headers();
    let hosts = headers.get_all(header::HOST).iter().count();
    if hosts > 1 || (hosts == 0 && request.version() == Version::HTTP_11) {
        return refused(StatusCode::BAD_REQUEST, "send exactly one Host header");
    }
    if is_chunked(headers) {
        let mut encodings = headers.get_all(header::TRANSFER_ENCODING).iter();
        let only = encodings.next().filter(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked"));
        if only.is_none() || encodings.next().is_some() {
            return refused(StatusCode::BAD_REQUEST, "send no Transfer-Encoding but `chunked`, once");
        }
    }
    None
}

/// Whether the body's end is told by its chunks. hyper hides a `Content-Length` beside such a header, so the
/// connection is closed after the answer: whoever counted bytes by the other header finds no place for a
/// second request.
pub fn is_chunked(headers: &HeaderMap) -> bool {
    headers.contains_key(header::TRANSFER_ENCODING)
}
