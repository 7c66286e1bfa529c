package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"net/netip"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// Header is one field of a webhook or of an answer: its name in canonical
// form and its values in the order they came. Value bytes are kept as received.
type Header struct {
	Name   string
	Values []string
}

// Webhook is the captured request of a provider as plain data. It is
// immutable after capture; every forwarding attempt builds a fresh request
// from it.
type Webhook struct {
	ID      string // unguessable, stable over deliveries; empty from a legacy server
	Method  string
	Path    string // as received: never decoded, never cleaned
	Query   string // as received with its leading "?"; empty when there was none
	Headers []Header
	Body    []byte
	Time    time.Time
	Respond bool          // the sender waits for the target's answer
	Timeout time.Duration // how long it still waits, when Respond
	Brief   bool          // it waits for the status alone
}

// Answer is what the target said to one webhook, or why it said nothing.
type Answer struct {
	Status  int // 200 to 599; 0 when Err is set
	Headers []Header
	Body    []byte
	Err     string // answerUnreachable or answerTimeout
}

const (
	answerUnreachable = "unreachable" // no connection to the target, or it broke
	answerTimeout     = "timeout"     // the target was silent until the event's time was over
)

// hopByHop lists what never crosses the relay: the fixed part of RFC 9110
// section 7.6.1, credentials meant for a proxy (RFC 9110 section 11.7), and
// the framing and expectation of the first hop, which every hop computes anew.
var hopByHop = map[string]bool{
	"Connection": true, "Proxy-Connection": true, "Keep-Alive": true, "Te": true,
	"Transfer-Encoding": true, "Upgrade": true, "Trailer": true,
	"Proxy-Authenticate": true, "Proxy-Authorization": true,
	"Content-Length": true, "Expect": true,
}

// relaysOwn tells whether a header name belongs to the relay: nobody outside
// may set those. Targets behind CGI or WSGI read "_" as "-".
func relaysOwn(name string) bool {
	const prefix = "x-relay-"
	return len(name) >= len(prefix) && strings.EqualFold(strings.ReplaceAll(name[:len(prefix)], "_", "-"), prefix)
}

// endToEnd returns the fields of h that cross the relay, sorted by name:
// without those named in Connection, then without the fixed hop-by-hop list
// (RFC 9110 section 7.6.1), and without any name of the relay's own.
func endToEnd(h map[string][]string) []Header {
	var named map[string]bool
	for _, v := range h["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			if named == nil {
				named = map[string]bool{}
			}
			named[textproto.CanonicalMIMEHeaderKey(textproto.TrimString(name))] = true
		}
	}
	fields := make([]Header, 0, len(h)+2)
	for name, values := range h {
		if len(values) > 0 && !hopByHop[name] && !named[name] && !relaysOwn(name) {
			fields = append(fields, Header{name, values})
		}
	}
	slices.SortFunc(fields, func(a, b Header) int { return cmp.Compare(a.Name, b.Name) })
	return fields
}

// requestTarget is a request target taken apart: the one reading of it that
// routing, authorisation, checks and forwarding share. Nothing is decoded.
type requestTarget struct {
	Path, Query string // as received; Query with its leading "?"
	Kind        string // the first segment of Path: webhooks, subscribe
	Channel     string // the second
	Tail        string // what follows Channel, with its leading "/"
}

var errTarget = errors.New("request target is neither a path nor an http or https URL")

// parseTarget takes a raw request target apart (RFC 9112 section 3.2): the
// origin form, or the absolute form, which loses its scheme and authority.
func parseTarget(raw string) (t requestTarget, err error) {
	rest := raw
	if !strings.HasPrefix(raw, "/") {
		scheme, after, absolute := strings.Cut(raw, "://")
		end := strings.IndexAny(after, "/?#")
		if !absolute || end <= 0 || after[end] != '/' || !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https") {
			return t, errTarget
		}
		rest = after[end:]
	}
	t.Path = rest
	if i := strings.IndexByte(rest, '?'); i >= 0 {
		t.Path, t.Query = rest[:i], rest[i:]
	}
	var below string
	t.Kind, below, _ = strings.Cut(t.Path[1:], "/")
	t.Channel = below
	if i := strings.IndexByte(below, '/'); i >= 0 {
		t.Channel, t.Tail = below[:i], below[i:]
	}
	return t, nil
}

// webhook is nil when t may be forwarded: exactly /webhooks/{channel} or below
// it, in any reading that a target may give it.
func (t *requestTarget) webhook() error {
	if t.Kind != "webhooks" || !validName(t.Channel) {
		return errOutside
	}
	return cmp.Or(checkPath(t.Path), checkQuery(t.Query))
}

var errOutside = errors.New("path is not /webhooks/{channel} or below it")

var errPath = errors.New("path has a dot segment, a backslash, a space, a control character or a broken escape")

// checkPath refuses every path that could leave the prefix it is appended to,
// in any reading a target may give it: dot segments, also escaped, behind an
// escaped slash, with parameters ("..;x", as servlet containers read it) or
// before what may look like a query or a fragment ("..#x", as URL parsers do);
// backslashes and control characters, plain or escaped; a plain space, which
// would end it.
func checkPath(path string) error {
	if !strings.HasPrefix(path, "/") || strings.IndexByte(path, ' ') >= 0 {
		return errPath
	}
	plain := path
	if strings.IndexByte(path, '%') >= 0 {
		var err error
		if plain, err = url.PathUnescape(path); err != nil {
			return errPath
		}
	}
	segment := 0
	for i := 0; i <= len(plain); i++ {
		if i == len(plain) || plain[i] == '/' {
			name := plain[segment:i]
			if end := strings.IndexAny(name, ";?#"); end >= 0 {
				name = name[:end]
			}
			if name == "." || name == ".." {
				return errPath
			}
			segment = i + 1
			continue
		}
		if c := plain[i]; c < ' ' || c == 0x7f || c == '\\' {
			return errPath
		}
	}
	return nil
}

// token tells whether s is a token of RFC 9110 section 5.6.2, as methods and
// header names must be.
func token(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return s != ""
}

// check is the receiving side's own look at method and headers: nothing in
// them may break the request that is built from it.
func (w *Webhook) check() error {
	if !token(w.Method) {
		return fmt.Errorf("method %.20q is no token", w.Method)
	}
	return checkHeaders(w.Headers)
}

// checkQuery refuses what would end the request line.
func checkQuery(query string) error {
	for i := range len(query) {
		if c := query[i]; c <= ' ' || c == 0x7f {
			return errors.New("query has a control character or a space")
		}
	}
	return nil
}

// checkHeaders refuses names that are no tokens and values that would end
// their line (RFC 9110 section 5.5).
func checkHeaders(headers []Header) error {
	for _, h := range headers {
		if !token(h.Name) {
			return fmt.Errorf("header name %.40q is no token", h.Name)
		}
		for _, v := range h.Values {
			for i := range len(v) {
				if c := v[i]; c < ' ' && c != '\t' || c == 0x7f {
					return fmt.Errorf("header %q has a control character", h.Name)
				}
			}
		}
	}
	return nil
}

// Event is one webhook in transit, encoded once. It is immutable and shared
// by all its subscribers; wire is what travels between replicas.
type Event struct {
	ID      string
	Channel string
	Respond bool
	Only    string       // deliver to this subscriber alone; empty: to all
	frame   []byte       // the SSE block
	wire    []byte       // the envelope of openEvent, which frame is the end of
	tail    int          // where the changing end of frame begins: respond and timeout
	uses    atomic.Int32 // queues that hold it; -1 once its maker has released it, too
}

// wires recycles the memory of events, which is most of what the collector has
// to do under load: BenchmarkIngest has 0.55 of the bare rate without it, and
// 0.7 with it.
var wires = sync.Pool{New: func() any { return new([]byte) }}

// release gives up one use of e: its maker's, or that of a queue whose stream
// has written it. After the last one nobody may touch its bytes. A use that is
// never given up, such as an evicted subscriber's, leaves e to the collector.
func (e *Event) release() {
	if e.uses.Add(-1) < 0 && cap(e.wire) <= 64<<10 {
		b := e.wire
		e.wire, e.frame = nil, nil
		wires.Put(&b)
	}
}

// newEvent encodes w for channel: the one encoding that every subscriber on
// every replica gets. size and text are what w.wireSize says.
func newEvent(channel string, w *Webhook, size int, text bool) *Event {
	e := &Event{ID: w.ID, Channel: channel, Respond: w.Respond}
	if !w.Respond { // held events would only drain the pool
		recycled := wires.Get().(*[]byte)
		if cap(*recycled) <= 2*size { // budgets count bytes that are used
			e.wire = (*recycled)[:0]
		} else {
			wires.Put(recycled)
		}
	}
	e.wire = slices.Grow(e.wire, size)
	e.wire = e.appendEnvelope(e.wire)
	start := len(e.wire)
	b := append(e.wire, "id: "...)
	b = append(b, w.ID...)
	b = append(b, "\ndata: "...)
	b = w.appendJSON(b, text)
	e.tail = len(b) - start
	if w.Brief {
		b = append(b, `,"mode":"status"`...)
		e.tail = len(b) - start
	}
	e.wire = appendTail(b, w.Respond, w.Timeout)
	e.frame = e.wire[start:]
	return e
}

// wireSize is how many bytes the event of w takes, for its body exactly and for
// the rest about, and whether the body travels as text.
func (w *Webhook) wireSize() (size int, text bool) {
	size, text = bodyForm(w.Body)
	return size + 512 + 3*len(w.Path) + 2*len(w.Query) + headerBytes(w.Headers), text
}

// lineLimit is how many bytes a client takes for one line or event.
const lineLimit = 64 << 20

// size is what e counts for in a queue: the relay's own events, which have no
// id, must not make a subscriber look slow.
func (e *Event) size() int64 {
	if e.ID == "" {
		return 0
	}
	return int64(len(e.frame))
}

func headerBytes(headers []Header) int {
	n := 0
	for _, h := range headers {
		for _, v := range h.Values {
			n += len(h.Name) + len(v) + 16
		}
	}
	return n
}

// appendTail closes the JSON object and the frame. It is the only part of an
// event that differs between deliveries, so it comes last.
func appendTail(b []byte, respond bool, timeout time.Duration) []byte {
	if respond {
		b = append(b, `,"respond":true,"timeout":`...)
		b = strconv.AppendInt(b, timeout.Milliseconds(), 10)
	}
	return append(b, "}\n\n"...)
}

// again is e for one more delivery, to one subscriber or (empty) to all, with
// what is left of its time. It copies the frame; e stays as it is.
func (e *Event) again(only string, left time.Duration) *Event {
	n := &Event{ID: e.ID, Channel: e.Channel, Respond: e.Respond, Only: only, tail: e.tail}
	b := make([]byte, 0, len(e.frame)+len(e.ID)+len(only)+64)
	b = n.appendEnvelope(b)
	start := len(b)
	n.wire = appendTail(append(b, e.frame[:e.tail]...), e.Respond, left)
	n.frame = n.wire[start:]
	return n
}

// envelopeVersion is the first byte of everything that travels between
// replicas; a replica ignores versions it does not know.
const envelopeVersion = 2

// appendEnvelope begins the form in which an event travels between replicas:
// the version, 1 when it asks for a response, channel, id, Only, then the frame
// as it is.
func (e *Event) appendEnvelope(b []byte) []byte {
	flag := byte(0)
	if e.Respond {
		flag = 1
	}
	return appendFields(append(b, envelopeVersion, flag), e.Channel, e.ID, e.Only)
}

// openEvent is the inverse of appendEnvelope: the frame is not parsed, and it
// aliases wire. An event of another channel is refused: with the prefixes "a" and
// "a-b" two relays have names in common.
func openEvent(channel string, wire []byte) (*Event, error) {
	if len(wire) < 2 || wire[0] != envelopeVersion {
		return nil, errEnvelope
	}
	e := &Event{Respond: wire[1]&1 != 0, wire: wire}
	rest, err := cutFields(wire[2:], &e.Channel, &e.ID, &e.Only)
	if err == nil && e.Channel != channel {
		err = errEnvelope
	}
	e.frame = rest
	return e, err
}

var errEnvelope = errors.New("unknown, broken or misdirected envelope")

// appendFields appends strings, each behind its length as a uvarint.
func appendFields(b []byte, fields ...string) []byte {
	for _, f := range fields {
		b = append(binary.AppendUvarint(b, uint64(len(f))), f...)
	}
	return b
}

// cutFields is the inverse of appendFields; it returns what follows them.
func cutFields(b []byte, fields ...*string) ([]byte, error) {
	for _, f := range fields {
		n, size := binary.Uvarint(b)
		if size <= 0 || n > uint64(len(b)-size) {
			return nil, errEnvelope
		}
		*f, b = string(b[size:size+int(n)]), b[size+int(n):]
	}
	return b, nil
}

// appendJSON appends the webhook's JSON object without its end, which
// appendTail writes. Written by hand because reflection and HTML escaping in
// encoding/json cost most of what a webhook costs; BenchmarkEncode has both.
func (w *Webhook) appendJSON(b []byte, text bool) []byte {
	b = append(b, `{"id":`...)
	b = appendString(b, w.ID)
	b = append(b, `,"method":`...)
	b = appendString(b, w.Method)
	b = append(b, `,"originalUrl":`...)
	b = appendLatin1(b, w.Path, w.Query)
	b = append(b, `,"path":`...)
	b = appendLatin1(b, w.Path)
	b = append(b, `,"query":`...)
	b = appendQuery(b, w.Query)
	b = append(b, `,"headers":`...)
	length := len(w.Body)
	if !text {
		length = -1 // bodyBase64 is longer than the body: no length a legacy client could trust
	}
	b = appendHeaders(b, w.Headers, length)
	b = appendBody(b, w.Body, text)
	b = append(b, `,"timestamp":`...)
	return strconv.AppendInt(b, w.Time.UnixMilli(), 10)
}

// appendQuery appends the flat query object that legacy clients read: every
// key once, repeated ones as arrays. What net/url cannot read is left out;
// our own client uses the raw query alone.
func appendQuery(b []byte, raw string) []byte {
	if len(raw) <= 1 {
		return append(b, "{}"...)
	}
	query := map[string]any{}
	values, _ := url.ParseQuery(raw[1:])
	for key, list := range values {
		query[key] = list
		if len(list) == 1 {
			query[key] = list[0]
		}
	}
	object, _ := json.Marshal(query) // puts U+FFFD for what is not UTF-8
	return append(b, object...)
}

// appendHeaders appends the headers object: lower-case names, latin1 values,
// set-cookie always an array (Node's form, which legacy clients expect), and
// content-length when length is not negative.
func appendHeaders(b []byte, headers []Header, length int) []byte {
	b = append(b, '{')
	for _, h := range headers {
		b = append(b, '"')
		for i := range len(h.Name) {
			c := h.Name[i]
			if 'A' <= c && c <= 'Z' {
				c += 'a' - 'A'
			}
			b = append(b, c)
		}
		b = append(b, `":`...)
		if len(h.Values) == 1 && h.Name != "Set-Cookie" {
			b = appendLatin1(b, h.Values[0])
		} else {
			b = append(b, '[')
			for i, v := range h.Values {
				if i > 0 {
					b = append(b, ',')
				}
				b = appendLatin1(b, v)
			}
			b = append(b, ']')
		}
		b = append(b, ',')
	}
	if length >= 0 {
		b = append(b, `"content-length":"`...)
		b = strconv.AppendInt(b, int64(length), 10)
		return append(b, `"}`...)
	}
	return append(bytes.TrimSuffix(b, []byte(",")), '}')
}

// bodyForm tells whether body travels as text, and how many bytes it takes. A
// long one that is mostly control characters does not, although it is valid
// UTF-8: JSON spells each in six bytes, and Redis cuts off a replica that has
// 32 MB to read.
func bodyForm(body []byte) (size int, text bool) {
	if text = utf8.Valid(body); text {
		for _, c := range body {
			size += int(spelled[c])
		}
		text = size <= 2*len(body)+64<<10
	}
	if !text {
		size = base64.StdEncoding.EncodedLen(len(body))
	}
	return size, text
}

// appendBody appends the body member: text as it is, anything else in base64.
func appendBody(b, body []byte, text bool) []byte {
	if text {
		return appendString(append(b, `,"body":`...), body)
	}
	b = base64.StdEncoding.AppendEncode(append(b, `,"bodyBase64":"`...), body)
	return append(b, '"')
}

const hexDigits = "0123456789abcdef"

// spelled is how many bytes each byte takes in a JSON string (RFC 8259 section
// 7); 1: it stands for itself. U+2028 does: only CR and LF end a line of an
// event stream.
var spelled = func() (t [256]uint8) {
	for c := range t {
		t[c] = uint8(max(1, len(appendEscape(nil, byte(c)))))
	}
	return t
}()

// appendString appends s, which must be valid UTF-8, as a JSON string.
func appendString[T string | []byte](b []byte, s T) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); i++ {
		if spelled[s[i]] > 1 {
			b = append(b, s[start:i]...)
			b = appendEscape(b, s[i])
			start = i + 1
		}
	}
	return append(append(b, s[start:]...), '"')
}

// appendLatin1 appends the concatenated parts as one JSON string in which each
// byte stands for the code point of the same number, as Node reads headers.
func appendLatin1(b []byte, parts ...string) []byte {
	b = append(b, '"')
	for _, s := range parts {
		for i := range len(s) {
			switch c := s[i]; {
			case c >= utf8.RuneSelf:
				b = utf8.AppendRune(b, rune(c))
			case spelled[c] == 1:
				b = append(b, c)
			default:
				b = appendEscape(b, c)
			}
		}
	}
	return append(b, '"')
}

// appendEscape appends the escape of c; nothing when it needs none.
func appendEscape(b []byte, c byte) []byte {
	switch {
	case c == '"' || c == '\\':
		return append(b, '\\', c)
	case c == '\n':
		return append(b, `\n`...)
	case c == '\r':
		return append(b, `\r`...)
	case c == '\t':
		return append(b, `\t`...)
	case c < ' ':
		return append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
	}
	return b
}

// latin1 is the inverse of appendLatin1; ok is false when s holds a code
// point that is no byte.
func latin1(s string) (_ string, ok bool) {
	ascii := true
	for i := 0; i < len(s) && ascii; i++ {
		ascii = s[i] < utf8.RuneSelf
	}
	if ascii {
		return s, true
	}
	b := make([]byte, 0, len(s))
	for _, r := range s {
		if r > 0xff {
			return "", false
		}
		b = append(b, byte(r))
	}
	return string(b), true
}

// wireValues is a header in JSON: one string or an array of strings, decoded
// from latin1.
type wireValues []string

func (v *wireValues) UnmarshalJSON(data []byte) error {
	var list []string
	if len(data) > 0 && data[0] == '[' {
		if err := json.Unmarshal(data, &list); err != nil {
			return err
		}
	} else {
		list = make([]string, 1)
		if err := json.Unmarshal(data, &list[0]); err != nil {
			return err
		}
	}
	for i, s := range list {
		var ok bool
		if list[i], ok = latin1(s); !ok {
			return errors.New("header value has a code point above U+00FF")
		}
	}
	*v = list
	return nil
}

// wireMessage is what webhooks and answers have in common on the wire.
type wireMessage struct {
	Headers    map[string]wireValues `json:"headers"`
	Body       string                `json:"body"`
	BodyBase64 []byte                `json:"bodyBase64"`
}

func (m *wireMessage) open() ([]Header, []byte, error) {
	h := make(map[string][]string, len(m.Headers))
	for name, values := range m.Headers {
		name = textproto.CanonicalMIMEHeaderKey(name)
		h[name] = append(h[name], values...)
	}
	headers := endToEnd(h)
	if err := checkHeaders(headers); err != nil {
		return nil, nil, err
	}
	if m.BodyBase64 != nil {
		return headers, m.BodyBase64, nil
	}
	return headers, []byte(m.Body), nil
}

// decodeWebhook reads the data of a message event, ours or a legacy server's,
// and checks it; hop-by-hop headers are gone from what it returns. Its errors
// hold no value of the event beyond a method or a header name.
func decodeWebhook(channel string, data []byte) (*Webhook, error) {
	var m struct {
		wireMessage
		ID          string `json:"id"`
		Method      string `json:"method"`
		OriginalURL string `json:"originalUrl"`
		Timestamp   int64  `json:"timestamp"`
		Respond     bool   `json:"respond"`
		Timeout     int64  `json:"timeout"`
		Mode        string `json:"mode"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, jsonError(err)
	}
	target, ok := latin1(m.OriginalURL)
	if !ok {
		return nil, errors.New("originalUrl has a code point above U+00FF")
	}
	w := &Webhook{
		ID:      m.ID,
		Method:  cmp.Or(m.Method, "POST"),
		Time:    time.UnixMilli(m.Timestamp),
		Respond: m.Respond && m.ID != "",
		Brief:   m.Mode == "status",
		Timeout: time.Duration(min(max(m.Timeout, 0), maxResponseTimeout.Milliseconds())) * time.Millisecond,
	}
	t, err := parseTarget(target)
	if err == nil {
		err = t.webhook()
	}
	if err == nil && t.Channel != channel {
		err = errOutside
	}
	if err != nil {
		return nil, err
	}
	w.Path, w.Query = t.Path, t.Query
	if w.ID != "" && !validName(w.ID) {
		return nil, errors.New("id has characters outside A-Z a-z 0-9 . _ ~ -, or is too long")
	}
	if w.Headers, w.Body, err = m.open(); err != nil {
		return nil, err
	}
	return w, w.check()
}

// maxResponseTimeout bounds how long a sender's request may be held, whoever says so.
const maxResponseTimeout = 15 * time.Minute

// jsonError keeps what encoding/json says of form and place and drops what it
// quotes: parts of a payload must not reach a log.
func jsonError(err error) error {
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("malformed JSON at byte %d", e.Offset)
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Errorf("%q is not of type %s", e.Field, e.Type)
	}
	return errors.New("malformed JSON")
}

// validName tells whether s can be a channel or an id: 1 to 128 of the
// unreserved characters of RFC 3986 section 2.3, and no dot segment. The
// Redis channels of the replicas themselves begin with "@", which no name does.
func validName(s string) bool {
	for i := range len(s) {
		c := s[i] | 0x20
		if !('a' <= c && c <= 'z') && !('0' <= s[i] && s[i] <= '9') && strings.IndexByte("._~-", s[i]) < 0 {
			return false
		}
	}
	return 0 < len(s) && len(s) <= 128 && s != "." && s != ".."
}

// encode is the report's JSON; with full unset headers and body stay out.
func (a *Answer) encode(full bool) []byte {
	if a.Err != "" {
		return append(appendString([]byte(`{"error":`), a.Err), '}')
	}
	b := strconv.AppendInt([]byte(`{"status":`), int64(a.Status), 10)
	if full {
		size, text := bodyForm(a.Body)
		b = slices.Grow(b, 64+headerBytes(a.Headers)+size)
		b = appendHeaders(append(b, `,"headers":`...), a.Headers, -1)
		b = appendBody(b, a.Body, text)
	}
	return append(b, '}')
}

// decodeAnswer reads a report and checks it, without hop-by-hop headers and
// without Set-Cookie: a cookie of the target means nothing to a provider.
func decodeAnswer(data []byte) (Answer, error) {
	var m struct {
		wireMessage
		Status int    `json:"status"`
		Error  string `json:"error"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return Answer{}, jsonError(err)
	}
	switch {
	case m.Error == answerUnreachable || m.Error == answerTimeout:
		return Answer{Err: m.Error}, nil
	case m.Error != "" || m.Status < 200 || m.Status > 599:
		return Answer{}, fmt.Errorf("report has neither a status from 200 to 599 nor a known error")
	}
	headers, body, err := m.open()
	headers = slices.DeleteFunc(headers, func(h Header) bool { return h.Name == "Set-Cookie" })
	return Answer{Status: m.Status, Headers: headers, Body: body}, err
}

// size is what a counts for while it is kept; 0 when there is none.
func (a *Answer) size() int64 {
	if a == nil {
		return 0
	}
	return int64(headerBytes(a.Headers) + len(a.Body))
}

// rank orders answers, best first: success, then what the target itself said,
// then silence, then no connection.
func (a *Answer) rank() int {
	switch {
	case a.Err == answerUnreachable:
		return 700
	case a.Err != "":
		return 600
	default:
		return a.Status / 100 * 100
	}
}

// replicaLength is how long the names are that replicas give themselves.
const replicaLength = 13

// newReplica is a name for a replica: 65 random bits.
func newReplica() string { return rand.Text()[:replicaLength] }

// newID is an id of 130 random bits, made by the replica it starts with.
func newID(replica string) string { return replica + "-" + rand.Text() }

// replicaOf is the replica that made id; empty when id has not exactly the form
// that newID gives it, so that nothing else is ever sent to a replica.
func replicaOf(id string) string {
	for i := range len(id) {
		if c := id[i]; i == replicaLength && c != '-' || i != replicaLength && !('A' <= c && c <= 'Z') && !('2' <= c && c <= '7') {
			return ""
		}
	}
	if len(id) != replicaLength+1+26 {
		return ""
	}
	return id[:replicaLength]
}

// Backoff yields growing delays. It belongs to one goroutine.
type Backoff struct {
	Initial, Max time.Duration
	Factor       float64
	Jitter       bool // each delay is shortened by up to its half
	tries        int
}

// Next is the delay before the next try.
func (b *Backoff) Next() time.Duration {
	d := float64(b.Max)
	if grown := float64(b.Initial) * math.Pow(b.Factor, float64(b.tries)); grown < d {
		d = grown
		b.tries++
	}
	if b.Jitter {
		d -= d / 2 * mathrand.Float64()
	}
	return time.Duration(d)
}

// Reset starts over after a success.
func (b *Backoff) Reset() { b.tries = 0 }

// Bus carries events to the subscribers of all replicas. All methods are safe
// for concurrent use.
type Bus interface {
	// Publish hands e to every replica that has subscribers for its channel
	// and returns how many took it; it answers within a second.
	Publish(ctx context.Context, e *Event) (receivers int, err error)
	// Signal hands sig to the replica it is for, or to all. One with From is
	// waited for, within a second, and receivers is how many took it; without
	// From it is only queued, and receivers means nothing.
	Signal(ctx context.Context, sig Signal) (receivers int, err error)
	// Run serves until ctx ends; only a failure beyond repair ends it earlier.
	Run(ctx context.Context) error
	// Check is nil while the bus works.
	Check(ctx context.Context) error
}

// Signal is what replicas tell each other about held requests.
type Signal struct {
	Kind       string
	To         string // the replica it is for; empty: every one
	From       string // the replica that waits for a signalAck
	Channel    string
	Event      string
	Subscriber string // in signalAnswer and signalAck the report's own id
	Client     string // how the client names itself over all its streams
	Data       string
}

// The kinds of Signal.
const (
	signalTaken   = "taken"   // to the holder: Data names the subscribers that Event was delivered to
	signalWritten = "written" // to the holder: a legacy Subscriber has Event on its stream
	signalAnswer  = "answer"  // to the holder: Client's report on Event is Data; answered by signalAck
	signalAck     = "ack"     // to the asking replica: Event's holder took the answer (Data "1") or not
	signalReady   = "ready"   // to all: Subscriber of Channel is ready
	signalLeft    = "left"    // to all: Subscriber of Channel is gone
	signalAgain   = "again"   // to all: the bus is back for a replica, publish held events once more
	signalJoined  = "joined"  // to all: one replica more, for the bus itself
)

// encode is the form in which a signal travels between replicas.
func (sig *Signal) encode() []byte {
	return appendFields([]byte{envelopeVersion}, sig.Kind, sig.To, sig.From, sig.Channel, sig.Event, sig.Subscriber, sig.Client, sig.Data)
}

// openSignal is the inverse of encode.
func openSignal(wire []byte) (sig Signal, err error) {
	if len(wire) == 0 || wire[0] != envelopeVersion {
		return sig, errEnvelope
	}
	_, err = cutFields(wire[1:], &sig.Kind, &sig.To, &sig.From, &sig.Channel, &sig.Event, &sig.Subscriber, &sig.Client, &sig.Data)
	return sig, err
}

// Delivery is one event given to one subscriber.
type Delivery struct {
	Subscriber string
	Client     string
	Legacy     bool // cannot answer: written is all it can tell
}

// takenSignal tells the holder of e to whom it went.
func takenSignal(e *Event, taken []Delivery) Signal {
	data, _ := json.Marshal(taken)
	return Signal{Kind: signalTaken, To: replicaOf(e.ID), Event: e.ID, Data: string(data)}
}

// neighbourhood is what shares by address are counted for: the address, or in
// IPv6 its /64, of which everybody has at least one (RFC 6177 section 2).
func neighbourhood(addr netip.Addr) netip.Addr {
	if addr.Is6() && !addr.Is4In6() {
		if p, err := addr.WithZone("").Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return addr.Unmap()
}

// half is the share of n that one party may take, so that others find space.
func half(n int) int { return (n + 1) / 2 }

// Limits bound a Hub. Zero values refuse everything.
type Limits struct {
	Subscribers int   // in total; one channel may have half of them
	PerAddress  int   // from one remote address, or one /64
	Buffer      int64 // bytes of undelivered frames for one subscriber
}

// Hub owns the live subscribers of this replica under one mutex. It sends and
// closes only under it and never blocks, and it keeps nothing for a channel
// without subscribers. With no Watch it is itself the Bus of a one-replica relay.
type Hub struct {
	Limits   Limits
	OnSignal func(Signal)         // set before use; called without mu
	Watch    func(channel string) // set before use; called under mu when channel got its first subscriber or lost its last

	Delivered, Evicted atomic.Int64 // events given to subscribers; subscribers that were too slow

	mu        sync.Mutex
	channels  map[string]*hubChannel
	total     int
	addresses map[netip.Addr]int // by neighbourhood
}

// hubChannel is guarded by Hub.mu.
type hubChannel struct {
	live        bool          // the bus confirmed its subscription
	confirmed   chan struct{} // closed while live; Subscriber.Live of all that came since it was made
	subscribers map[*Subscriber]struct{}
}

// Subscriber is one live stream and its queue, bounded by bytes. Whoever
// subscribes fills in the first part.
type Subscriber struct {
	Client     string // see Signal.Client; empty from a legacy client
	Channel    string
	Addr       netip.Addr
	Credential [32]byte // hash of the token it came with
	Responds   bool     // its client reports answers
	Drains     bool     // its client knows the drain event
	Write      func()   // writes what Take gives until that is nothing; runs in a goroutine of its own, one at a time

	ID      string
	Live    <-chan struct{} // closed once every replica's events reach it
	Gone    atomic.Bool     // set before abort is called
	Writers sync.WaitGroup  // Write under way; nobody is added once Gone is set

	hub     *Hub
	abort   func() // guarded by hub.mu, like all below: makes a blocked read or write fail; called once, must not block
	writing bool   // Write is under way, or the stream has not begun
	missed  bool   // a held event found no space in queue
	finish  error  // end with this reason once the queue is empty
	reason  error  // why it ended
	queue   []*Event
	bytes   int64 // of queue and of the batch being written
	batch   int64 // bytes of the batch that Take handed out
}

// wake puts the one token into a channel that holds one.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Why a stream ends; logged as its reason.
var (
	errSlow        = errors.New("evicted: slow subscriber, its queue is full")
	errRevoked     = errors.New("evicted: token revoked")
	errPeerGone    = errors.New("peer closed the stream")
	errShutdown    = errors.New("shutting down")
	errStreamAge   = errors.New("stream reached its age")
	errOverdue     = errors.New("evicted: subscriber did not take its events in time")
	errSubscribers = errors.New("too many subscribers")
	errPerAddress  = errors.New("too many subscribers from one address")
	errPerChannel  = errors.New("too many subscribers of one channel")
)

// Subscribe registers s, which then belongs to the hub until Leave. Events
// queue from this moment on; they are complete once s.Live is closed. The
// caller writes the beginning of the stream and then calls s.Write, once.
func (h *Hub) Subscribe(s *Subscriber) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.channels[s.Channel]
	switch near := neighbourhood(s.Addr); {
	case h.total >= h.Limits.Subscribers:
		return errSubscribers
	case h.addresses[near] >= h.Limits.PerAddress:
		return errPerAddress
	case c != nil && len(c.subscribers) >= half(h.Limits.Subscribers):
		return errPerChannel
	}
	s.hub = h
	s.ID = rand.Text()
	s.writing = true
	if h.channels == nil {
		h.channels, h.addresses = map[string]*hubChannel{}, map[netip.Addr]int{}
	}
	h.total++
	h.addresses[neighbourhood(s.Addr)]++
	if c == nil {
		c = &hubChannel{confirmed: make(chan struct{}), subscribers: map[*Subscriber]struct{}{}}
		h.channels[s.Channel] = c
		if h.Watch != nil {
			h.Watch(s.Channel)
		} else {
			c.confirm()
		}
	}
	c.subscribers[s] = struct{}{}
	s.Live = c.confirmed
	return nil
}

// Attach gives s the connection that abort ends. One that has ended already
// is aborted at once.
func (h *Hub) Attach(s *Subscriber, abort func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.abort = abort
	if s.reason != nil {
		abort()
	}
}

// Leave ends s for reason, unless it ended before; nothing of it stays.
func (h *Hub) Leave(s *Subscriber, reason error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.end(s, reason)
}

// Finish ends s once all that is queued is written.
func (h *Hub) Finish(s *Subscriber, reason error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.writing {
		s.finish = reason
	} else {
		h.end(s, reason)
	}
}

// Subscribers lists the live streams.
func (h *Hub) Subscribers() (list []*Subscriber) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.channels {
		list = slices.AppendSeq(list, maps.Keys(c.subscribers))
	}
	return list
}

// Reason is why s ended; nil while it lives.
func (h *Hub) Reason(s *Subscriber) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return s.reason
}

// end removes s and makes its stream fail. It needs mu.
func (h *Hub) end(s *Subscriber, reason error) {
	if s.reason != nil {
		return
	}
	s.reason = reason
	s.queue = nil
	h.total--
	near := neighbourhood(s.Addr)
	if h.addresses[near]--; h.addresses[near] == 0 {
		delete(h.addresses, near)
	}
	c := h.channels[s.Channel]
	if delete(c.subscribers, s); len(c.subscribers) == 0 {
		delete(h.channels, s.Channel)
		if h.Watch != nil {
			h.Watch(s.Channel)
		}
	}
	s.Gone.Store(true)
	if s.abort != nil {
		s.abort()
	}
}

// Deliver queues e for its channel's subscribers. For an event that asks for
// a response it returns to whom it went. A subscriber whose queue would
// overflow is evicted, unless the event is held and comes again: see Missed. An
// empty queue takes any one event.
func (h *Hub) Deliver(e *Event) (taken []Delivery, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.channels[e.Channel]
	if c == nil {
		return nil, 0
	}
	size := e.size()
	for s := range c.subscribers {
		if e.Only != "" && e.Only != s.ID {
			continue
		}
		if s.bytes > 0 && s.bytes+size > h.Limits.Buffer {
			if s.missed = s.missed || e.Respond; e.Respond {
				continue
			}
			h.Evicted.Add(1)
			h.end(s, errSlow)
			continue
		}
		s.push(e)
		n++
		if e.Respond {
			taken = append(taken, Delivery{s.ID, s.Client, !s.Responds})
		}
	}
	h.Delivered.Add(int64(n))
	return taken, n
}

// Push queues a frame of the relay's own, such as a heartbeat, for s alone. It
// tells whether s still lives.
func (h *Hub) Push(s *Subscriber, e *Event) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.reason == nil {
		s.push(e)
	}
	return s.reason == nil
}

// push queues e and sees that somebody writes it. It needs hub.mu.
func (s *Subscriber) push(e *Event) {
	e.uses.Add(1)
	s.queue = append(s.queue, e)
	s.bytes += e.size()
	if !s.writing {
		s.writing = true
		s.Writers.Go(s.Write)
	}
}

// burst is how many bytes Take hands out at once, beyond the first event.
const burst = 256 << 10

// Take moves the next batch of queued events to Write, its only caller; the
// batch before counts as written. An empty batch ends Write. dst is reused.
func (s *Subscriber) Take(dst []*Event) []*Event {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.bytes -= s.batch
	s.batch = 0
	n := 0
	for n < len(s.queue) && (n == 0 || s.batch+s.queue[n].size() <= burst) {
		s.batch += s.queue[n].size()
		n++
	}
	dst = append(dst[:0], s.queue[:n]...)
	if s.queue = slices.Delete(s.queue, 0, n); len(s.queue) == 0 {
		s.queue = nil // an idle stream costs little
	}
	if n == 0 {
		s.writing = false
		if s.finish != nil {
			s.hub.end(s, s.finish)
		}
	}
	return dst
}

// Missed tells, once, whether held events found no space in the queue of s.
func (s *Subscriber) Missed() bool {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	missed := s.missed
	s.missed = false
	return missed
}

// Confirm marks a channel's bus subscription as live.
func (h *Hub) Confirm(channel string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.channels[channel]; c != nil {
		c.confirm()
	}
}

func (c *hubChannel) confirm() {
	if !c.live {
		c.live = true
		close(c.confirmed)
	}
}

// Suspend marks all channels as not live: the bus is down. Streams that are
// open stay; new ones wait for Confirm.
func (h *Hub) Suspend() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.channels {
		if c.live {
			c.live, c.confirmed = false, make(chan struct{})
		}
	}
}

// Wants tells whether the channel has subscribers here.
func (h *Hub) Wants(channel string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.channels[channel] != nil
}

// Channels lists the channels that have subscribers here.
func (h *Hub) Channels() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.channels))
}

// Count is how many subscribers and channels there are.
func (h *Hub) Count() (subscribers, channels int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.total, len(h.channels)
}

// Publish implements Bus for a relay of one replica.
func (h *Hub) Publish(_ context.Context, e *Event) (int, error) {
	taken, n := h.Deliver(e)
	if e.Respond && n > 0 {
		h.OnSignal(takenSignal(e, taken))
	}
	return min(n, 1), nil
}

// Signal implements Bus for a relay of one replica.
func (h *Hub) Signal(_ context.Context, sig Signal) (int, error) {
	h.OnSignal(sig)
	return 1, nil
}

// Run implements Bus: the hub has nothing to do.
func (h *Hub) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Check implements Bus, and is the proof that nobody sits on mu.
func (h *Hub) Check(ctx context.Context) error {
	for !h.mu.TryLock() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("hub is stuck: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	h.mu.Unlock()
	return nil
}
