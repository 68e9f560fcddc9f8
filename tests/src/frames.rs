//! Frames of HTTP/2 made by hand, for clients that do what no library does.

/// What a client sends first, before its SETTINGS.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Frame types.
pub const DATA: u8 = 0;
/// A head, or its first part.
pub const HEADERS: u8 = 1;
/// The end of a stream by force.
pub const RST_STREAM: u8 = 3;
/// Settings.
pub const SETTINGS: u8 = 4;
/// A request for an echo.
pub const PING: u8 = 6;
/// The end of the connection.
pub const GOAWAY: u8 = 7;
/// A later part of a head.
pub const CONTINUATION: u8 = 9;
/// Flags: of SETTINGS and PING.
pub const ACK: u8 = 1;
/// Of HEADERS and DATA.
pub const END_STREAM: u8 = 1;
/// Of HEADERS and CONTINUATION.
pub const END_HEADERS: u8 = 4;

/// A frame on a stream; 0 is the connection.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or_default().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The preface, and SETTINGS that change nothing.
pub fn opening() -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()
}

/// The fields of a review's head in HPACK, without Huffman codes and without the dynamic table.
pub fn review_fields() -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap_or_default()], text.as_bytes()].concat();
    // :method POST, :scheme https; then literals with the static names :path, :authority and content-type.
    [&[0x83, 0x87, 0x04][..], &text("/mutate"), &[0x01], &text("localhost"), &[0x0f, 0x10], &text("application/json")]
        .concat()
}

/// The head of a review whose body follows.
pub fn review_head(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &review_fields())
}
