// What server, client and bus share: webhooks and answers, their forms on the
// wire, events, the bus and what replicas tell each other over it, the budget, and
// the hub, which queues events for subscribers. At the end, what both sides tell
// and count of webhooks.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"container/list"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// The fixed bounds of events; the package doc lists what happens at each.
const (
	maxResponseTimeout = 15 * time.Minute     // a sender's request may be held, whoever says so
	headLimit          = 64 << 10             // bytes of a message before its body
	fieldLimit         = 500                  // values of its header from outside: each costs more than its bytes
	ownFields          = 8                    // values that the relay adds, at most
	lineLimit          = 64 << 20             // bytes that a client takes for one line or event
	answerLimit        = 1 << 20              // bytes of the body of a target's answer
	holdCost           = 1 << 10              // bytes that a hold takes besides its event
	stallTime          = time.Second          // for which nothing must have come of a body before it gives its place up
	burst              = 256 << 10            // bytes that Take hands out at once, beyond the first event
	fewWriters         = 4                    // that one event starts by themselves; of more, as many as there are processors
	writersTime        = 2 * time.Millisecond // in which one of these must end, or one more is started
	replicaLength      = 13                   // letters of the names that replicas give themselves
	shownLimit         = 256                  // bytes of what strangers choose that are shown
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
	Scheme  string        // http or https, as the sender used it; empty from a legacy server
	Time    time.Time     // when it came, by the clock of the replica that took it
	Mode    string        // what its sender waits for; empty from a legacy server
	Timeout time.Duration // for which it waits; 0 in accept
}

// Response modes: what a provider is told, and when.
const (
	modeAccept   = "accept"   // 200 as soon as the bus took the event
	modeStatus   = "status"   // the target's status
	modeResponse = "response" // the target's status, headers and body
)

// respond reports whether the sender of a webhook waits for the target.
func respond(mode string) bool { return mode == modeStatus || mode == modeResponse }

// Answer is what the target said to one webhook, or why it said nothing.
type Answer struct {
	Status  int // 200 to 599; 0 when Err is set
	Headers []Header
	Body    []byte
	Err     string // one of the below; empty: the target said something
}

const (
	answerUnreachable = "unreachable" // no connection to the target, or it broke
	answerTimeout     = "timeout"     // the target was silent until the event's time was over
	answerTaken       = "taken"       // none yet: a client whose streams end is still forwarding it
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

// relaysOwn reports whether a header name belongs to the relay: nobody outside
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
		if !absolute || end <= 0 || after[end] != '/' || checkQuery(after[:end]) != nil || !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https") {
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

// isToken reports whether s is a token of RFC 9110 section 5.6.2, as methods and
// header names must be.
func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return s != ""
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
		if !isToken(h.Name) {
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

// Event is one webhook in transit, encoded once. Its bytes are immutable and
// shared by all its subscribers and deliveries.
type Event struct {
	ID      string
	Channel string
	Mode    string
	Holder  string    // the replica that holds it: receipts go there
	Round   int       // counts the holder's publications of it, so that no receipt counts for another
	Only    string    // who is given it: a client by name, onlyReporters, or (empty) everybody
	Until   time.Time // when its sender's time is over; zero: never

	chunk []byte // the block of the stream, in the frame of appendChunk
	wire  []byte // the envelope of openEvent with chunk at its end; nil for another delivery
	first *Event // whose bytes these are; nil: its own

	legacyOnce sync.Once
	legacy     []byte       // what legacyChunk made
	claim      *claim       // what its bytes take of the budget; nil: nothing
	uses       atomic.Int32 // its maker, and queues that hold it
	kept       atomic.Bool  // its bytes may still be read by somebody who does not say when he is done
}

// onlyReporters in Event.Only is for those who can report, and no legacy reader
// that would take a second delivery for a second webhook.
const onlyReporters = "@"

// wires recycles the memory of events, which is most of what the collector has
// to do under load.
var wires = sync.Pool{New: func() any { return new([]byte) }}

// owner is the event whose bytes e has.
func (e *Event) owner() *Event {
	if e.first != nil {
		return e.first
	}
	return e
}

// use adds one use of the bytes of e; release gives one up: its maker's, or that
// of a queue whose stream has written it. After the last one nobody may touch
// them.
func (e *Event) use() { e.owner().uses.Add(1) }

func (e *Event) release() {
	o := e.owner()
	if o.uses.Add(-1) > 0 {
		return
	}
	o.claim.end()
	if b := o.wire; !o.kept.Load() && cap(b) <= 64<<10 {
		o.wire, o.chunk, o.legacy = nil, nil, nil
		wires.Put(&b)
	}
}

// newEvent encodes w for channel, which replica holds: the one encoding that
// every subscriber on every replica gets. ok is false when the budget has no space
// for it and its hold; a nil budget has.
func newEvent(channel, replica string, w *Webhook, b *Budget) (e *Event, ok bool) {
	text := isText(w.Body)
	size := w.wireSize(text)
	e = &Event{ID: w.ID, Channel: channel, Mode: w.Mode, Holder: replica, Round: 1}
	if b != nil {
		if e.claim, ok = b.claim(channel, int64(holdCost+size)); !ok {
			return nil, false
		}
	}
	if respond(w.Mode) {
		e.Until = time.Now().Add(w.Timeout)
	}
	e.uses.Store(1)
	recycled := wires.Get().(*[]byte)
	if cap(*recycled) <= 2*size { // the budget counts bytes that are used
		e.wire = (*recycled)[:0]
	} else {
		wires.Put(recycled)
	}
	e.wire = e.appendEnvelope(slices.Grow(e.wire, size))
	start := len(e.wire)
	e.wire = appendChunk(e.wire, func(b []byte) []byte {
		b = append(b, "id: "...)
		b = append(b, w.ID...)
		b = append(b, "\nevent: webhook\n"...)
		b = w.appendMessage(b, text)
		return append(b, '\n')
	})
	e.chunk = e.wire[start:]
	e.claim.add(int64(len(e.wire) - size))
	return e, true
}

// repeat is e for one more delivery, with the bytes of the first: a client knows
// from its time how old it is. It has no use of its own.
func (e *Event) repeat(holder string, round int, only string) *Event {
	return &Event{
		ID: e.ID, Channel: e.Channel, Mode: e.Mode, Holder: holder, Round: round, Only: only, Until: e.Until,
		chunk: e.chunk, first: e.owner(),
	}
}

// over reports whether nobody waits for e any more.
func (e *Event) over(now time.Time) bool { return !e.Until.IsZero() && now.After(e.Until) }

// chunkHead and chunkTail are what a chunk has around the block (RFC 9112
// section 7.1): eight hexadecimal digits and CRLF; CRLF.
const (
	chunkHead = 10
	chunkTail = 2
)

// appendChunk appends what add appends, as one chunk of HTTP/1.1.
func appendChunk(b []byte, add func([]byte) []byte) []byte {
	start := len(b)
	b = add(append(b, "00000000\r\n"...))
	n := len(b) - start - chunkHead
	for i := start + 7; n > 0; i-- {
		b[i] = hexDigits[n&15]
		n >>= 4
	}
	return append(b, "\r\n"...)
}

const hexDigits = "0123456789abcdef"

// newFrame is an event of the relay's own. It has no id, counts for nothing, and
// its maker never gives up its use.
func newFrame(block string) *Event {
	e := &Event{chunk: appendChunk(nil, func(b []byte) []byte { return append(b, block...) })}
	e.uses.Store(1)
	return e
}

// chunkFor is e in the form that a subscriber reads: HTTP, or the legacy JSON.
func (e *Event) chunkFor(http bool) []byte {
	if http || e.ID == "" {
		return e.chunk
	}
	return e.owner().legacyChunk()
}

// block is a chunk without what is around it.
func block(chunk []byte) []byte { return chunk[chunkHead : len(chunk)-chunkTail] }

// wireSize is at least how many bytes the event of w takes.
func (w *Webhook) wireSize(text bool) int {
	n := 512 + len(w.Method) + 2*len(w.Path) + 2*len(w.Query) + 2*headerBytes(w.Headers)
	if text {
		return n + len(w.Body) + len(linePrefix)*(bytes.Count(w.Body, []byte("\n"))+1)
	}
	return n + base64.StdEncoding.EncodedLen(len(w.Body))
}

// size is what e counts for in a queue: the relay's own events, which have no
// id, must not make a subscriber look slow.
func (e *Event) size() int64 {
	if e.ID == "" {
		return 0
	}
	return int64(len(e.chunk))
}

// valueCount is how many values the fields of h have.
func valueCount(h map[string][]string) int {
	n := 0
	for _, values := range h {
		n += len(values)
	}
	return n
}

// headerBytes is about how many bytes headers take.
func headerBytes(headers []Header) int {
	n := 0
	for _, h := range headers {
		for _, v := range h.Values {
			n += len(h.Name) + len(v) + 16
		}
	}
	return n
}

// envelopeVersion is the first byte of everything that travels between
// replicas; a replica ignores versions it does not know.
const envelopeVersion = 3

// appendEnvelope begins the form in which an event travels between replicas:
// the version, all that Event says, the milliseconds that are left to it (0: no
// end), then the chunk as it is.
func (e *Event) appendEnvelope(b []byte) []byte {
	left := int64(0)
	if !e.Until.IsZero() {
		left = min(max(1, time.Until(e.Until).Milliseconds()), maxResponseTimeout.Milliseconds())
	}
	b = appendFields(append(b, envelopeVersion), e.Channel, e.ID, e.Mode, e.Holder, e.Only)
	return binary.AppendUvarint(binary.AppendUvarint(b, uint64(e.Round)), uint64(left))
}

// message is what travels between replicas.
func (e *Event) message() []byte {
	if e.wire != nil {
		return e.wire
	}
	return append(e.appendEnvelope(make([]byte, 0, len(e.chunk)+256)), e.chunk...)
}

// openEvent is the inverse of message: the chunk is not parsed, and it aliases
// wire. An event of another channel is refused: with the prefixes "a" and "a-b"
// two relays have names in common.
func openEvent(channel string, wire []byte) (*Event, error) {
	if len(wire) == 0 || wire[0] != envelopeVersion {
		return nil, errEnvelope
	}
	e := &Event{wire: wire}
	e.uses.Store(1)
	rest, err := cutFields(wire[1:], &e.Channel, &e.ID, &e.Mode, &e.Holder, &e.Only)
	if err != nil {
		return nil, err
	}
	round, rest := cutNumber(rest)
	left, rest := cutNumber(rest)
	if e.Channel != channel || e.ID == "" || left < 0 || len(rest) < chunkHead+chunkTail {
		return nil, errEnvelope
	}
	if left > 0 {
		e.Until = time.Now().Add(time.Duration(min(left, maxResponseTimeout.Milliseconds())) * time.Millisecond)
	}
	e.Round, e.chunk = int(round), rest
	return e, nil
}

var errEnvelope = errors.New("unknown, broken or misdirected envelope")

// appendFields appends strings, each behind its length as a uvarint.
func appendFields(b []byte, fields ...string) []byte {
	for _, f := range fields {
		b = append(binary.AppendUvarint(b, uint64(len(f))), f...)
	}
	return b
}

// cutNumber cuts a uvarint off b; -1 when there is none.
func cutNumber(b []byte) (int64, []byte) {
	n, size := binary.Uvarint(b)
	if size <= 0 || n > math.MaxInt32 {
		return -1, nil
	}
	return int64(n), b[size:]
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

// linePrefix begins each line of a message on the stream.
const linePrefix = "data: "

// appendMessage appends w as an HTTP message (RFC 9112) with LF for line ends,
// each line as a data line. Bytes above 0x7F before the body stand for the code
// points of the same numbers, because a stream is UTF-8.
func (w *Webhook) appendMessage(b []byte, text bool) []byte {
	b = append(append(append(b, linePrefix...), w.Method...), ' ')
	b = appendLatin1(appendLatin1(b, w.Path), w.Query)
	b = append(b, " HTTP/1.1\n"...)
	for _, h := range w.Headers {
		for _, v := range h.Values {
			b = append(append(append(b, linePrefix...), h.Name...), ": "...)
			b = append(appendLatin1(b, v), '\n')
		}
	}
	length := len(w.Body)
	if !text {
		b = append(b, "data: X-Relay-Body: base64\n"...)
		length = base64.StdEncoding.EncodedLen(length)
	}
	b = strconv.AppendInt(append(b, "data: Content-Length: "...), int64(length), 10)
	b = strconv.AppendInt(append(b, "\ndata: X-Relay-Time: "...), w.Time.UnixMilli(), 10)
	if w.Scheme == "https" {
		b = append(b, "\ndata: X-Relay-Scheme: https"...)
	}
	b = append(append(b, "\ndata: X-Relay-Respond: "...), w.Mode...)
	if respond(w.Mode) {
		b = strconv.AppendInt(append(b, "; timeout="...), w.Timeout.Milliseconds(), 10)
	}
	b = append(b, "\ndata:\n"...)
	if !text {
		b = append(b, linePrefix...)
		return append(base64.StdEncoding.AppendEncode(b, w.Body), '\n')
	}
	for rest := w.Body; ; {
		b = append(b, linePrefix...)
		end := bytes.IndexByte(rest, '\n')
		if end < 0 {
			return append(append(b, rest...), '\n')
		}
		b = append(b, rest[:end+1]...)
		rest = rest[end+1:]
	}
}

// isText reports whether a body can be on the stream as it is: valid UTF-8
// without CR, which would end a line. Not so when its lines are so short that
// the prefixes cost more than base64 does.
func isText(body []byte) bool {
	return bytes.IndexByte(body, '\r') < 0 &&
		len(linePrefix)*bytes.Count(body, []byte("\n")) <= len(body)/3+16<<10 && utf8.Valid(body)
}

// appendLatin1 appends s with each byte as the code point of the same number,
// as Node reads headers.
func appendLatin1(b []byte, s string) []byte {
	start := 0
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			b = utf8.AppendRune(append(b, s[start:i]...), rune(s[i]))
			start = i + 1
		}
	}
	return append(b, s[start:]...)
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

// decodeWebhook reads the data of a webhook event: an HTTP message, which came
// under id. It checks all that may reach the target; hop-by-hop fields are gone
// from what it returns. Its errors hold nothing of the event beyond a method or
// the name of a field.
func decodeWebhook(channel, id string, data []byte) (*Webhook, error) {
	end := bytes.Index(data[:min(len(data), headLimit)], []byte("\n\n"))
	if end < 0 {
		return nil, fmt.Errorf("head is not complete within %d bytes", headLimit)
	}
	head, ok := latin1(string(data[:end]))
	if !ok {
		return nil, errors.New("head has a code point above U+00FF")
	}
	line, rest, _ := strings.Cut(head, "\n")
	method, after, _ := strings.Cut(line, " ")
	target, ok := strings.CutSuffix(after, " HTTP/1.1")
	if !ok {
		return nil, errors.New("no request line of HTTP/1.1")
	}
	if !validName(id) {
		return nil, errors.New("id has characters outside A-Z a-z 0-9 . _ ~ -, or is too long")
	}
	w := &Webhook{ID: id, Method: method}
	fields, err := parseFields(rest)
	if err != nil {
		return nil, err
	}
	own := http.Header(fields).Get
	w.Mode, after, _ = strings.Cut(own("X-Relay-Respond"), ";")
	if timeout, ok := strings.CutPrefix(strings.TrimSpace(after), "timeout="); ok {
		ms, _ := strconv.ParseUint(timeout, 10, 31)
		w.Timeout = min(time.Duration(ms)*time.Millisecond, maxResponseTimeout)
	}
	if w.Scheme = "http"; own("X-Relay-Scheme") == "https" {
		w.Scheme = "https"
	}
	ms, _ := strconv.ParseInt(own("X-Relay-Time"), 10, 64)
	w.Time = time.UnixMilli(ms)
	body := data[end+2:]
	if length := own("Content-Length"); length != strconv.Itoa(len(body)) {
		return nil, fmt.Errorf("body has %d bytes, and not its Content-Length", len(body))
	}
	if own("X-Relay-Body") == "base64" {
		if w.Body, err = base64.StdEncoding.AppendDecode(nil, body); err != nil {
			return nil, errors.New("body is no base64")
		}
	} else if len(body) > 0 {
		w.Body = bytes.Clone(body)
	}
	w.Headers = endToEnd(fields)
	return w, w.aim(channel, target)
}

// parseFields reads field lines that end in LF.
func parseFields(lines string) (map[string][]string, error) {
	n := strings.Count(lines, "\n") + 1
	if n > fieldLimit+ownFields {
		return nil, fmt.Errorf("head has more than %d fields", fieldLimit)
	}
	fields := make(map[string][]string, n)
	values := make([]string, 0, n)
	for line := range strings.SplitSeq(lines, "\n") {
		if line == "" {
			continue
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok || !isToken(name) {
			return nil, errors.New("head has a line that is no field")
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		value = textproto.TrimString(value)
		if known := fields[name]; known != nil {
			fields[name] = append(known, value)
		} else {
			values = append(values, value)
			fields[name] = values[len(values)-1 : len(values) : len(values)]
		}
	}
	return fields, nil
}

// aim gives w its target, and checks all that becomes part of a request: nothing
// may break it, or reach anything but what is below the channel.
func (w *Webhook) aim(channel, target string) error {
	t, err := parseTarget(target)
	switch {
	case err != nil:
		return err
	case !isToken(w.Method):
		return fmt.Errorf("method %.20q is no token", w.Method)
	case t.Channel != channel:
		return errOutside
	}
	w.Path, w.Query = t.Path, t.Query
	return cmp.Or(t.webhook(), checkHeaders(w.Headers))
}

// The legacy form: what legacy servers send, and what readers get that do not
// say X-Relay-Features: http.

// legacyMessage is the data of an unnamed event. Header values hold one code
// point for each byte.
type legacyMessage struct {
	Headers     map[string]any `json:"headers"` // string, or []string when repeated and for set-cookie
	OriginalURL string         `json:"originalUrl"`
	Path        string         `json:"path"`
	Query       map[string]any `json:"query"` // likewise
	Body        *string        `json:"body,omitempty"`
	BodyBase64  []byte         `json:"bodyBase64,omitempty"` // when it is not UTF-8
	Timestamp   int64          `json:"timestamp"`            // milliseconds
}

// legacyChunk is e in the legacy form, made when the first reader of this
// replica needs it.
func (e *Event) legacyChunk() []byte {
	e.legacyOnce.Do(func() {
		e.kept.Store(true) // the memory of two forms is not recycled
		e.legacy = appendChunk(nil, func(b []byte) []byte {
			w, err := decodeWebhook(e.Channel, e.ID, unframe(block(e.chunk)))
			if err != nil { // no replica of this version sends such
				return append(b, ": unreadable\n\n"...)
			}
			b = append(append(append(b, "id: "...), e.ID...), "\ndata: "...)
			return append(append(b, w.legacyJSON()...), '\n')
		})
		e.claim.add(int64(len(e.legacy)))
	})
	return e.legacy
}

// unframe is the data of a block that newEvent made.
func unframe(block []byte) []byte {
	data := make([]byte, 0, len(block))
	for line := range bytes.Lines(block) {
		if value, ok := bytes.CutPrefix(line, []byte("data:")); ok {
			data = append(data, bytes.TrimPrefix(value, []byte(" "))...)
		}
	}
	return bytes.TrimSuffix(data, []byte("\n"))
}

// legacyJSON is w as one line of JSON and its end.
func (w *Webhook) legacyJSON() []byte {
	m := legacyMessage{
		Headers:     make(map[string]any, len(w.Headers)+1),
		OriginalURL: string(appendLatin1(nil, w.Path+w.Query)),
		Path:        string(appendLatin1(nil, w.Path)),
		Query:       legacyQuery(w.Query),
		Timestamp:   w.Time.UnixMilli(),
	}
	for _, h := range w.Headers {
		values := make([]string, len(h.Values))
		for i, v := range h.Values {
			values[i] = string(appendLatin1(nil, v))
		}
		if len(values) == 1 && h.Name != "Set-Cookie" {
			m.Headers[strings.ToLower(h.Name)] = values[0]
		} else {
			m.Headers[strings.ToLower(h.Name)] = values
		}
	}
	if utf8.Valid(w.Body) {
		body := string(w.Body)
		m.Body = &body
		m.Headers["content-length"] = strconv.Itoa(len(body))
	} else { // of another length than a legacy client would send
		m.BodyBase64 = w.Body
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	encoder.Encode(m) // strings, numbers and maps of them cannot fail
	return b.Bytes()
}

// legacyQuery is the flat object from which legacy clients build their URL:
// every key once, repeated ones as arrays. What cannot be decoded stays as it is.
func legacyQuery(raw string) map[string]any {
	query := map[string]any{}
	for part := range strings.SplitSeq(strings.TrimPrefix(raw, "?"), "&") {
		if part == "" {
			continue
		}
		key, value, _ := strings.Cut(part, "=")
		key, value = unescape(key), unescape(value)
		switch known := query[key].(type) {
		case nil:
			query[key] = value
		case string:
			query[key] = []string{known, value}
		case []string:
			query[key] = append(known, value)
		}
	}
	return query
}

// unescape decodes a part of a query if that makes text.
func unescape(part string) string {
	part = string(appendLatin1(nil, part))
	if plain, err := url.QueryUnescape(part); err == nil && utf8.ValidString(plain) {
		return plain
	}
	return part
}

// decodeLegacy reads the data of an unnamed event, as legacy servers send it,
// with the checks of decodeWebhook.
func decodeLegacy(channel string, data []byte) (*Webhook, error) {
	var m struct {
		Headers     json.RawMessage `json:"headers"`
		OriginalURL string          `json:"originalUrl"`
		Body        string          `json:"body"`
		Timestamp   int64           `json:"timestamp"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, jsonError(err)
	}
	target, ok := latin1(m.OriginalURL)
	if !ok {
		return nil, errors.New("originalUrl has a code point above U+00FF")
	}
	w := &Webhook{Method: "POST", Time: time.UnixMilli(m.Timestamp), Body: []byte(m.Body)}
	fields, err := legacyFields(m.Headers)
	if err != nil {
		return nil, err
	}
	w.Headers = endToEnd(fields)
	return w, w.aim(channel, target)
}

// legacyFields reads the headers object: strings, or arrays of strings.
func legacyFields(data json.RawMessage) (map[string][]string, error) {
	if len(data) > headLimit {
		return nil, fmt.Errorf("headers take more than %d bytes", headLimit)
	}
	var list map[string]json.RawMessage
	if len(data) == 0 {
		return nil, nil
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, jsonError(err)
	}
	fields := make(map[string][]string, len(list))
	for name, value := range list {
		values := make([]string, 1)
		var err error
		if value[0] == '[' {
			err = json.Unmarshal(value, &values)
		} else {
			err = json.Unmarshal(value, &values[0])
		}
		if err != nil {
			return nil, jsonError(err)
		}
		for i, v := range values {
			var ok bool
			if values[i], ok = latin1(v); !ok {
				return nil, errors.New("header value has a code point above U+00FF")
			}
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		if fields[name] = append(fields[name], values...); len(fields) > fieldLimit || len(fields[name]) > fieldLimit {
			return nil, fmt.Errorf("headers have more than %d values", fieldLimit)
		}
	}
	return fields, nil
}

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

// validName reports whether s can be a channel or an id: 1 to 128 of the
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

// A report is an HTTP response: the target's, or why there is none.

// appendReport appends a, the answer to the event id, as an HTTP/1.1 response.
func (a *Answer) appendReport(b *bytes.Buffer, id string) {
	resp := http.Response{
		StatusCode: a.Status, ProtoMajor: 1, ProtoMinor: 1, Header: make(http.Header, len(a.Headers)+2),
		ContentLength: int64(len(a.Body)), Body: io.NopCloser(bytes.NewReader(a.Body)),
	}
	if len(a.Body) == 0 {
		resp.Body = nil
	}
	for _, h := range a.Headers {
		resp.Header[h.Name] = h.Values
	}
	resp.Header["X-Relay-Event-Id"] = []string{id}
	if a.Err != "" {
		resp.Header["X-Relay-Error"] = []string{a.Err}
		resp.StatusCode = map[string]int{
			answerUnreachable: http.StatusBadGateway, answerTimeout: http.StatusGatewayTimeout, answerTaken: http.StatusAccepted,
		}[a.Err]
	}
	resp.Write(b) // a buffer takes everything
}

// reports reads the reports of one request, one after the other.
type reports struct {
	in  io.LimitedReader
	buf *bufio.Reader
}

func newReports(r io.Reader) *reports {
	rs := &reports{in: io.LimitedReader{R: r}}
	rs.buf = bufio.NewReader(&rs.in)
	return rs
}

var errNoReport = errors.New("no response with an event id, a status from 200 to 599 and a length")

// next reads one report and checks it; io.EOF is the end. The answer is without
// hop-by-hop fields and without Set-Cookie: a cookie of the target means nothing
// to a provider. The body is only kept when wanted says so of the id.
func (rs *reports) next(wanted func(id string) bool) (id string, a Answer, err error) {
	rs.in.N = headLimit
	if _, err := rs.buf.Peek(1); err != nil {
		return "", a, err
	}
	resp, err := http.ReadResponse(rs.buf, nil)
	if err != nil { // it may quote what was sent
		return "", a, errNoReport
	}
	defer resp.Body.Close()
	id, a.Status, a.Err = resp.Header.Get("X-Relay-Event-Id"), resp.StatusCode, resp.Header.Get("X-Relay-Error")
	switch {
	case replicaOf(id) == "" || a.Status < 200 || a.Status > 599 || valueCount(resp.Header) > fieldLimit+ownFields,
		resp.ContentLength < 0 && len(resp.TransferEncoding) == 0 || resp.ContentLength > answerLimit,
		!slices.Contains([]string{"", answerUnreachable, answerTimeout, answerTaken}, a.Err):
		return "", a, errNoReport
	}
	rs.in.N = answerLimit + headLimit
	if !wanted(id) {
		_, err = io.Copy(io.Discard, resp.Body)
		return id, a, err
	}
	a.Headers = slices.DeleteFunc(endToEnd(resp.Header), func(h Header) bool { return h.Name == "Set-Cookie" })
	if err := checkHeaders(a.Headers); err != nil {
		return "", a, err
	}
	if a.Body, err = io.ReadAll(resp.Body); err == nil && len(a.Body) > answerLimit {
		err = errNoReport
	}
	return id, a, err
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

// Bus carries events to the subscribers of all replicas, and what replicas tell
// each other. All methods are safe for concurrent use.
type Bus interface {
	// Publish hands e to every replica that has subscribers for its channel
	// and returns how many took it. While the bus is away it waits until ctx
	// ends.
	Publish(ctx context.Context, e *Event) (receivers int, err error)
	// Send hands sig to the replica it is for, or to all, and returns how many
	// took it.
	Send(ctx context.Context, sig Signal) (receivers int, err error)
	// Tell queues sig and does not wait. What is queued keeps its order.
	Tell(sig Signal)
	// Flush returns once what was told before has been sent, or ctx ends.
	Flush(ctx context.Context)
	// Peers are the names of the other replicas.
	Peers(ctx context.Context) ([]string, error)
	// Run serves until ctx ends; only a failure beyond repair ends it earlier.
	Run(ctx context.Context) error
	// Check is nil while the bus works.
	Check(ctx context.Context) error
}

// Signal is what replicas tell each other about holds. The package doc has the
// protocol; each kind has the fields that it names.
type Signal struct {
	Kind       string
	To         string // the replica it is for; empty: every one
	From       string // the replica that tells it
	Channel    string
	Event      string
	Subscriber string
	Client     string // how the client names itself over all its streams
	Data       []byte
	Round      int
	Given      []Given
}

// The kinds of Signal.
const (
	signalReceipt = "receipt" // to the holder: Event was given to these subscribers in this round
	signalReport  = "report"  // to the holder, or to all when it is gone: Client's report on Event is Data
	signalReady   = "ready"   // to all: a stream of Client on Channel is ready, or has space again
	signalLeft    = "left"    // to all: Subscriber on Channel is gone
	signalGone    = "gone"    // from the bus: the replica From is gone, with all its subscribers
	signalAgain   = "again"   // to all: the bus was away for From, what was told meanwhile may be lost
	signalHand    = "hand"    // to one replica: hold Event of Channel, which is Data, from now on; Client is whom it may be given to, as in Event.Only
	signalJoined  = "joined"  // to all: one replica more, for the bus itself
)

// encode is the form in which a signal travels between replicas.
func (sig *Signal) encode() []byte {
	b := appendFields([]byte{envelopeVersion}, sig.Kind, sig.To, sig.From, sig.Channel, sig.Event, sig.Subscriber, sig.Client, string(sig.Data))
	b = binary.AppendUvarint(b, uint64(sig.Round))
	for _, g := range sig.Given {
		b = appendFields(b, g.Subscriber, g.Client)
	}
	return b
}

// openSignal is the inverse of encode.
func openSignal(wire []byte) (sig Signal, err error) {
	if len(wire) == 0 || wire[0] != envelopeVersion {
		return sig, errEnvelope
	}
	var data string
	rest, err := cutFields(wire[1:], &sig.Kind, &sig.To, &sig.From, &sig.Channel, &sig.Event, &sig.Subscriber, &sig.Client, &data)
	if err != nil {
		return sig, err
	}
	sig.Data = []byte(data)
	round, rest := cutNumber(rest)
	if round < 0 {
		return sig, errEnvelope
	}
	sig.Round = int(round)
	for len(rest) > 0 {
		var g Given
		if rest, err = cutFields(rest, &g.Subscriber, &g.Client); err != nil {
			return sig, err
		}
		sig.Given = append(sig.Given, g)
	}
	return sig, nil
}

// Given is one event given to one subscriber.
type Given struct {
	Subscriber string
	Client     string // empty: it cannot report, and having it is all it can tell
}

// receipt tells the holder of e to whom it was given.
func receipt(e *Event, replica string, given []Given) Signal {
	return Signal{Kind: signalReceipt, To: e.Holder, From: replica, Event: e.ID, Round: e.Round, Given: given}
}

// Budget bounds the memory of all webhooks on their way: held, being read, or
// queued for a subscriber. Of its bytes one channel may have half, and bodies
// that are still being read may have half; when those are used up, the one that
// has stalled longest gives its place up, so that nobody starves the others.
type Budget struct {
	Limit int64

	mu sync.Mutex

	// Guarded by mu.
	used     int64
	reading  int64            // of used: bodies being read
	channels map[string]int64 // of used, by channel
	bodies   list.List        // of *claim: being read, the one that stalled longest first
}

// claim is what one webhook takes of a Budget. A nil claim takes nothing.
type claim struct {
	budget  *Budget
	channel string

	// Guarded by budget.mu.
	bytes int64
	place *list.Element      // in bodies; nil: no body is being read
	moved time.Time          // when the body was last seen to come
	body  interface{ cut() } // its reading can be made to fail
}

// claim begins with n bytes for channel; ok is false, and there is no claim,
// when there is no space.
func (b *Budget) claim(channel string, n int64) (c *claim, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used+n > b.Limit || b.channels[channel]+n > half(b.Limit) {
		return nil, false
	}
	c = &claim{budget: b, channel: channel}
	c.grow(n)
	return c, true
}

// force begins with n bytes for channel, whatever the space.
func (b *Budget) force(channel string, n int64) *claim {
	c := &claim{budget: b, channel: channel}
	c.add(n)
	return c
}

// Used is how many bytes are taken.
func (b *Budget) Used() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// grow needs budget.mu.
func (c *claim) grow(n int64) {
	b := c.budget
	c.bytes += n
	b.used += n
	if c.place != nil {
		b.reading += n
	}
	if b.channels == nil {
		b.channels = map[string]int64{}
	}
	if b.channels[c.channel] += n; b.channels[c.channel] == 0 {
		delete(b.channels, c.channel)
	}
}

// add takes n bytes more, or gives them back, whatever the limit.
func (c *claim) add(n int64) {
	if c != nil {
		c.budget.mu.Lock()
		c.grow(n)
		c.budget.mu.Unlock()
	}
}

// end gives everything back.
func (c *claim) end() {
	if c != nil {
		c.budget.mu.Lock()
		c.readDone()
		c.grow(-c.bytes)
		c.budget.mu.Unlock()
	}
}

// read counts n bytes more of a body that is being read, and reports whether
// there is space for them. A body that loses its place is cut.
func (c *claim) read(n int, body interface{ cut() }) bool {
	b, now := c.budget, time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case c.body == nil: // its first bytes
		c.body, c.place = body, b.bodies.PushBack(c)
		b.reading += c.bytes
	case c.place == nil:
		return false // it has lost its place
	default:
		b.bodies.MoveToBack(c.place)
	}
	c.moved = now
	c.grow(int64(n))
	for b.reading > half(b.Limit) || b.used > b.Limit {
		stalled := b.bodies.Front().Value.(*claim)
		if stalled == c || now.Sub(stalled.moved) < stallTime {
			return false
		}
		stalled.readDone()
		stalled.grow(-stalled.bytes)
		stalled.body.cut()
	}
	return b.channels[c.channel] <= half(b.Limit)
}

// readDone ends the reading of the body. It needs budget.mu.
func (c *claim) readDone() {
	if c.place != nil {
		c.budget.reading -= c.bytes
		c.budget.bodies.Remove(c.place)
		c.place = nil
	}
}

// set makes n what c takes: its body has been read. It reports whether c still
// had its place.
func (c *claim) set(n int64) bool {
	c.budget.mu.Lock()
	defer c.budget.mu.Unlock()
	had := c.body == nil || c.place != nil
	c.readDone()
	c.grow(n - c.bytes)
	return had
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
func half[N int | int64](n N) N { return (n + 1) / 2 }

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
	Budget   *Budget              // shared with the server
	OnSignal func(Signal)         // set before use; called without mu
	Watch    func(channel string) // set before use; called under mu when channel got its first subscriber or lost its last

	Delivered, Full, Evicted atomic.Int64 // events given to subscribers; not given because a queue was full; subscribers that were stuck

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
	named       map[string][]*Subscriber // of subscribers, by client
}

// Credential is what a subscriber came with. Whether that is enough is for
// whoever admits it.
type Credential struct {
	Token        [32]byte            // hash of its token
	Certificates []*x509.Certificate // of its connection, its own first; nobody has verified them
}

// Subscriber is one live stream and its queue, bounded by bytes. Whoever
// subscribes fills in the first part.
type Subscriber struct {
	Client     string // see Signal.Client; empty from a legacy client
	Channel    string
	Addr       netip.Addr
	Credential Credential
	HTTP       bool   // it reads webhooks as HTTP messages
	Responds   bool   // its client reports; it has a name then
	Drains     bool   // its client knows the drain event
	Write      func() // writes what Take gives until that is nothing; runs in a goroutine of its own, one at a time

	ID      string
	Since   time.Time       // when it subscribed
	Live    <-chan struct{} // closed once every replica's events reach it
	Gone    atomic.Bool     // set before abort is called
	Moving  atomic.Bool     // its client was asked to open another stream
	Writers sync.WaitGroup  // Write under way; nobody is added once Gone is set

	hub *Hub

	// Guarded by hub.mu.
	abort   func() // makes a blocked read or write fail; called once, must not block
	writing bool   // Write is under way, or the stream has not begun
	missed  bool   // an event found no space in queue
	finish  error  // end with this reason once the queue is empty
	reason  error  // why it ended
	queue   []*Event
	bytes   int64 // of queue and of the batch being written
	batch   int64 // bytes of the batch that Take handed out
}

// SubscriberState is what the status page shows of a Subscriber.
type SubscriberState struct {
	Client  string     `json:"client,omitempty"`
	Addr    netip.Addr `json:"addr"`
	Since   time.Time  `json:"since"`
	Waiting int64      `json:"waiting"` // bytes
}

// wake puts the one token into a channel that holds one.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// alarm is a timer that is not set yet: f, which it calls, may set it again.
func alarm(f func()) *time.Timer {
	t := time.AfterFunc(math.MaxInt64, f)
	t.Stop()
	return t
}

// Why a stream ends; logged as its reason.
var (
	errStuck       = errors.New("evicted: stuck subscriber, a write made no progress")
	errRevoked     = errors.New("evicted: token or certificate revoked")
	errPeerGone    = errors.New("peer closed the stream")
	errShutdown    = errors.New("shutting down")
	errReplaced    = errors.New("its client has opened another stream")
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
	c, near := h.channels[s.Channel], neighbourhood(s.Addr)
	switch {
	case h.total >= h.Limits.Subscribers:
		return errSubscribers
	case h.addresses[near] >= h.Limits.PerAddress:
		return errPerAddress
	case c != nil && len(c.subscribers) >= half(h.Limits.Subscribers):
		return errPerChannel
	}
	s.hub = h
	s.ID, s.Since = rand.Text(), time.Now()
	s.writing = true
	if h.channels == nil {
		h.channels, h.addresses = map[string]*hubChannel{}, map[netip.Addr]int{}
	}
	h.total++
	h.addresses[near]++
	if c == nil {
		c = &hubChannel{confirmed: make(chan struct{}), subscribers: map[*Subscriber]struct{}{}, named: map[string][]*Subscriber{}}
		h.channels[s.Channel] = c
		if h.Watch != nil {
			h.Watch(s.Channel)
		} else {
			c.confirm()
		}
	}
	c.subscribers[s] = struct{}{}
	if s.Client != "" {
		c.named[s.Client] = append(c.named[s.Client], s)
	}
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

// Replace ends all streams of client on channel but id and those that it was asked
// to leave: it opens another one unasked only when the one before is dead, which
// the network may not tell for long.
func (h *Hub) Replace(channel, client, id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.channels[channel]; c != nil {
		for _, s := range c.named[client] {
			if s.ID != id && !s.Moving.Load() {
				h.end(s, errReplaced)
			}
		}
	}
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

// States are at most so many subscribers of channel, and how many there are.
func (h *Hub) States(channel string, most int) (list []SubscriberState, count int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	list = []SubscriberState{}
	c := h.channels[channel]
	if c == nil {
		return list, 0
	}
	for s := range c.subscribers {
		if len(list) < most {
			list = append(list, SubscriberState{s.Client, s.Addr, s.Since, s.bytes})
		}
	}
	return list, len(c.subscribers)
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
	for _, e := range s.queue {
		e.release()
	}
	s.queue = nil
	h.total--
	near := neighbourhood(s.Addr)
	if h.addresses[near]--; h.addresses[near] == 0 {
		delete(h.addresses, near)
	}
	c := h.channels[s.Channel]
	if c.named[s.Client] = slices.DeleteFunc(slices.Clone(c.named[s.Client]), func(other *Subscriber) bool { return other == s }); len(c.named[s.Client]) == 0 {
		delete(c.named, s.Client)
	}
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

// Deliver queues e for its channel's subscribers, as far as it is for them, and
// returns to whom it was given. One whose queue is full is not given it, and says
// so when it has space again: see Take. An empty queue takes any one event.
func (h *Hub) Deliver(e *Event) (given []Given) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.channels[e.Channel]
	if c == nil {
		return nil
	}
	if e.owner().claim == nil && !h.admit(e, c) {
		return nil
	}
	size := e.size()
	var few [8]*Subscriber
	idle := few[:0] // whose writers must be started
	for s := range c.subscribers {
		switch {
		case e.Only != "" && !s.Responds, e.Only != "" && e.Only != onlyReporters && e.Only != s.Client:
			continue
		case s.bytes > 0 && s.bytes+size > h.Limits.Buffer:
			s.missed = true
			h.Full.Add(1)
			continue
		}
		if s.push(e) {
			idle = append(idle, s)
		}
		g := Given{Subscriber: s.ID}
		if s.Responds {
			g.Client = s.Client
		}
		given = append(given, g)
	}
	if len(idle) <= fewWriters {
		for _, s := range idle {
			go s.run()
		}
	} else {
		go rouse(slices.Clone(idle))
	}
	h.Delivered.Add(int64(len(given)))
	return given
}

// rouse runs the writers of many subscribers, one after the other and as many at
// once as there are processors: whatever else is to run would wait behind as many
// goroutines. While nothing moves, because writes wait for their readers, one more
// runs. It ends when all have begun.
func rouse(idle []*Subscriber) {
	var begun atomic.Int64
	work := func() {
		for n := begun.Add(1); n <= int64(len(idle)); n = begun.Add(1) {
			idle[n-1].run()
		}
	}
	for range runtime.GOMAXPROCS(0) {
		go work()
	}
	for last := int64(-1); begun.Load() < int64(len(idle)); time.Sleep(writersTime) {
		if now := begun.Load(); now == last {
			go work()
		} else {
			last = now
		}
	}
}

// run writes what is queued.
func (s *Subscriber) run() {
	defer s.Writers.Done()
	s.Write()
}

// admit takes space for an event of another replica; without, all subscribers of
// the channel miss it. One that has nothing queued gets one event whatever the
// space: what is held may take it all, and would wait for itself. It needs mu.
func (h *Hub) admit(e *Event, c *hubChannel) bool {
	if h.Budget == nil {
		return true
	}
	var ok bool
	if e.claim, ok = h.Budget.claim(e.Channel, e.size()); ok {
		return true
	}
	for s := range c.subscribers {
		if s.bytes == 0 {
			e.claim = h.Budget.force(e.Channel, e.size())
			return true
		}
	}
	for s := range c.subscribers {
		s.missed = true
	}
	h.Full.Add(1)
	return false
}

// Push queues a frame of the relay's own, such as a heartbeat, for s alone. It
// reports whether s still lives.
func (h *Hub) Push(s *Subscriber, e *Event) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.reason == nil && s.push(e) {
		go s.run()
	}
	return s.reason == nil
}

// push queues e, and reports whether the caller must start run. It needs hub.mu.
func (s *Subscriber) push(e *Event) bool {
	e.use()
	s.queue = append(s.queue, e)
	s.bytes += e.size()
	if s.writing {
		return false
	}
	s.writing = true
	s.Writers.Add(1)
	return true
}

// Take moves the next batch of queued events to Write, its only caller; the
// batch before counts as written. An empty batch ends Write. dst is reused. What
// nobody waits for any more is dropped. space reports, once, that there is
// space again, half of the queue, for events that found none.
func (s *Subscriber) Take(dst []*Event) (batch []*Event, space bool) {
	now := time.Now()
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.bytes -= s.batch
	s.batch = 0
	batch = dst[:0]
	n := 0
	for ; n < len(s.queue); n++ {
		e := s.queue[n]
		size := e.size()
		if e.over(now) {
			s.bytes -= size
			e.release()
			continue
		}
		if len(batch) > 0 && s.batch+size > burst {
			break
		}
		s.batch += size
		batch = append(batch, e)
	}
	if s.queue = slices.Delete(s.queue, 0, n); len(s.queue) == 0 && cap(s.queue) > 4 {
		s.queue = nil // an idle stream costs little
	}
	if space = s.missed && s.bytes <= s.hub.Limits.Buffer/2; space {
		s.missed = false
	}
	if len(batch) == 0 {
		s.writing = false
		if s.finish != nil {
			s.hub.end(s, s.finish)
		}
	}
	return batch, space
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

// Wants reports whether the channel has subscribers here.
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
	if !h.Wants(e.Channel) {
		return 0, nil
	}
	h.OnSignal(receipt(e, e.Holder, h.Deliver(e)))
	return 1, nil
}

// Send implements Bus for a relay of one replica.
func (h *Hub) Send(_ context.Context, sig Signal) (int, error) {
	h.OnSignal(sig)
	return 1, nil
}

// Tell implements Bus for a relay of one replica.
func (h *Hub) Tell(sig Signal) { h.OnSignal(sig) }

// Flush implements Bus: Tell has done it.
func (h *Hub) Flush(context.Context) {}

// Peers implements Bus: there are none.
func (h *Hub) Peers(context.Context) ([]string, error) { return nil, nil }

// Run implements Bus: the hub has nothing to do.
func (h *Hub) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Check implements Bus, and is the proof that nobody sits on mu.
func (h *Hub) Check(ctx context.Context) error { return comesFree(ctx, "hub", &h.mu) }

// comesFree is nil when mu, which guards what, becomes free before ctx ends.
func comesFree(ctx context.Context, what string, mu *sync.Mutex) error {
	for !mu.TryLock() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is stuck: %w", what, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	mu.Unlock()
	return nil
}

// What servers and clients tell and count of webhooks.

// Passage is one webhook as an operator sees it on one side: metadata alone. It
// is made anew for each stage.
type Passage struct {
	Event   string    `json:"event,omitempty"`
	Channel string    `json:"channel"`
	Method  string    `json:"method,omitempty"`
	Path    string    `json:"path,omitempty"` // as shown makes it
	Time    time.Time `json:"time"`           // when it came
	Bytes   int       `json:"bytes"`          // of its body
	Status  int       `json:"status,omitempty"`
	Attempt int       `json:"attempt,omitempty"`
	Outcome string    `json:"outcome"`
	Reason  string    `json:"reason,omitempty"`
	MS      float64   `json:"ms"` // since it came; 0 while it is under way
}

// Outcomes of webhooks, at the server and at the client.
const (
	outcomeHeld     = "held" // not known yet
	outcomeAccepted = "accepted"
	outcomeAnswered = "answered"
	outcomeRefused  = "refused"
	outcomeLost     = "lost"

	outcomeForwarding = "forwarding" // not known yet
	outcomeForwarded  = "forwarded"
	outcomeFailed     = "failed"
)

// became is p with its outcome, which is known now.
func (p Passage) became(outcome, reason string) Passage {
	p.Outcome, p.Reason, p.MS = outcome, reason, float64(time.Since(p.Time).Microseconds())/1e3
	return p
}

// took is how long p was under way; it is measured once.
func (p *Passage) took() time.Duration { return time.Duration(p.MS * float64(time.Millisecond)) }

// tell logs p, but for what is not known, behind what else there is to say.
func (p *Passage) tell(log *slog.Logger, level slog.Level, message string, more ...slog.Attr) {
	if h, ok := log.Handler().(interface{ Silent(message string) bool }); ok && h.Silent(message) {
		return // under load most are
	}
	attrs := append(make([]slog.Attr, 0, 16), more...) // on the stack
	if p.Event != "" {
		attrs = append(attrs, slog.String("event", p.Event))
	}
	attrs = append(attrs, slog.String("method", p.Method), slog.String("path", p.Path), slog.Int("bytes", p.Bytes))
	if p.Status != 0 {
		attrs = append(attrs, slog.Int("status", p.Status))
	}
	if p.Attempt != 0 {
		attrs = append(attrs, slog.Int("attempt", p.Attempt))
	}
	log.LogAttrs(context.Background(), level, message, append(attrs, slog.Float64("ms", p.MS))...)
}

// shown is a path, or anything else that strangers choose, as it is logged: cut
// where nobody reads on.
func shown(s string) string {
	if len(s) <= shownLimit {
		return s
	}
	return strings.ToValidUTF8(s[:shownLimit], "") + "…"
}

// tally counts by a label whose values are fixed when it is made. It is safe for
// concurrent use.
type tally map[string]*atomic.Int64

func newTally(values ...string) tally {
	t := tally{}
	for _, v := range values {
		t[v] = new(atomic.Int64)
	}
	return t
}

// Histogram counts durations by how long they are. The zero value is ready; it
// is safe for concurrent use.
type Histogram struct {
	counts [len(histogramBounds) + 1]atomic.Int64 // of those up to each bound, and of the rest
	sum    atomic.Int64                           // nanoseconds
}

// histogramBounds are in seconds: what is fast is told apart, and what nears the
// time limits.
var histogramBounds = [...]float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

// Observe counts d; less than nothing is nothing.
func (h *Histogram) Observe(d time.Duration) {
	d = max(d, 0)
	i := 0
	for i < len(histogramBounds) && d.Seconds() > histogramBounds[i] {
		i++
	}
	h.counts[i].Add(1)
	h.sum.Add(int64(d))
}
