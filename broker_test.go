package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"path"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// onlyMessage parses an SSE block with the client's parser. It must be exactly
// one event, a webhook in one of its two forms.
func onlyMessage(t testing.TB, frame []byte) message {
	t.Helper()
	p := newParser(bytes.NewReader(frame))
	m, err := p.next()
	if err != nil || m.name != "message" && m.name != "webhook" {
		t.Fatalf("frame %q is no webhook: %q, %v", frame, m.name, err)
	}
	m.data = bytes.Clone(m.data)
	if extra, err := p.next(); err == nil {
		t.Fatalf("frame %q holds a second event %q", frame, extra.name)
	}
	return m
}

// decodeOwn reads a webhook in either form, as a client of the very channel of
// the event does. Where the legacy form tells no id, that of the block stands.
func decodeOwn(name, id string, data []byte) (*Webhook, error) {
	if name == "webhook" {
		line, _, _ := bytes.Cut(data, []byte("\n"))
		_, target, _ := bytes.Cut(line, []byte(" "))
		plain, _ := latin1(string(bytes.TrimSuffix(target, []byte(" HTTP/1.1"))))
		parsed, _ := parseTarget(plain)
		return decodeWebhook(parsed.Channel, id, data)
	}
	var m struct{ OriginalURL string }
	json.Unmarshal(data, &m) // decodeLegacy says what is wrong with it
	target, _ := latin1(m.OriginalURL)
	parsed, _ := parseTarget(target)
	w, err := decodeLegacy(parsed.Channel, data)
	if err == nil {
		w.ID = id
	}
	return w, err
}

// frameOf is the block of e, without the chunk around it.
func frameOf(e *Event) string { return string(block(e.chunk)) }

// httpBlock is a webhook event as another source might send it: under id, with a
// head of whole lines, to which its length is added.
func httpBlock(id, head, body string) string {
	data := head + "Content-Length: " + strconv.Itoa(len(body)) + "\n\n" + body
	return "id: " + id + "\nevent: webhook\ndata: " + strings.ReplaceAll(data, "\n", "\ndata: ") + "\n\n"
}

// readyFrame is the block that begins a stream.
func readyFrame(heartbeat time.Duration) string { return frameOf(readyEvent(heartbeat)) }

// legacyFrame is the block of e for readers that announce nothing.
func legacyFrame(e *Event) string { return string(block(e.chunkFor(false))) }

// opened is the webhook in a frame.
func opened(t testing.TB, frame []byte) *Webhook {
	t.Helper()
	m := onlyMessage(t, frame)
	w, err := decodeOwn(m.name, m.id, m.data)
	if err != nil {
		t.Fatalf("decode %q: %v", frame, err)
	}
	return w
}

// sameWebhook compares every byte that the target could tell apart.
func sameWebhook(t testing.TB, got, want *Webhook) {
	t.Helper()
	if got.ID != want.ID || got.Method != want.Method || got.Path != want.Path || got.Query != want.Query {
		t.Fatalf("decoded %q %q %q%q, want %q %q %q%q", got.ID, got.Method, got.Path, got.Query, want.ID, want.Method, want.Path, want.Query)
	}
	equal := func(a, b Header) bool { return a.Name == b.Name && slices.Equal(a.Values, b.Values) }
	if !slices.EqualFunc(got.Headers, want.Headers, equal) {
		t.Fatalf("decoded headers %q, want %q", got.Headers, want.Headers)
	}
	if !bytes.Equal(got.Body, want.Body) {
		t.Fatalf("decoded body %q, want %q", got.Body, want.Body)
	}
	if !got.Time.Equal(want.Time) || got.Mode != want.Mode || got.Timeout != want.Timeout {
		t.Fatalf("decoded %v %q %v, want %v %q %v", got.Time, got.Mode, got.Timeout, want.Time, want.Mode, want.Timeout)
	}
}

var wireTime = time.UnixMilli(1700000000000)

// TestWireShape holds the form of webhooks on the stream to the letter, since
// clients of another make and version read it.
func TestWireShape(t *testing.T) {
	hook := func(query string, body string, headers ...Header) *Webhook {
		return &Webhook{ID: "r-1", Method: "POST", Path: "/webhooks/ci/p", Query: query, Headers: headers, Body: []byte(body), Time: wireTime, Mode: modeAccept, Timeout: 9 * time.Second}
	}
	in := func(mode string, w *Webhook) *Webhook {
		w.Mode = mode
		return w
	}
	const (
		front = "POST /webhooks/ci/p HTTP/1.1\n"
		at    = "X-Relay-Time: 1700000000000\n"
		end   = at + "X-Relay-Respond: accept\n\n"
	)
	for _, tc := range []struct {
		name string
		w    *Webhook
		want string // the message
	}{
		{"plain", hook("", "{}", Header{"Content-Type", []string{"application/json"}}, Header{"Host", []string{"h:1"}}),
			front + "Content-Type: application/json\nHost: h:1\nContent-Length: 2\n" + end + "{}"},
		{"empty body", hook("", ""), front + "Content-Length: 0\n" + end},
		{"the sender waits", in(modeResponse, hook("", "")), front + "Content-Length: 0\n" + at + "X-Relay-Respond: response; timeout=9000\n\n"},
		{"for the status alone", in(modeStatus, hook("", "")), front + "Content-Length: 0\n" + at + "X-Relay-Respond: status; timeout=9000\n\n"},
		{"latin1 values", hook("", "", Header{"X-A", []string{"caf\xe9 \x80\xff\t."}}), front + "X-A: caf\u00e9 \u0080\u00ff\t.\nContent-Length: 0\n" + end},
		{"repeated header", hook("", "", Header{"X-Dup", []string{"one", "two", "one"}}), front + "X-Dup: one\nX-Dup: two\nX-Dup: one\nContent-Length: 0\n" + end},
		{"empty value", hook("", "", Header{"X-A", []string{""}}), front + "X-A: \nContent-Length: 0\n" + end},
		{"lines", hook("", "a\n\nb\n"), front + "Content-Length: 5\n" + end + "a\n\nb\n"},
		{"a newline alone", hook("", "\n"), front + "Content-Length: 1\n" + end + "\n"},
		{"text of any kind", hook("", "a\u2028b\x00\"\\\t\x1f\x7f\u00e9<&>: \ufeff"), front + "Content-Length: 21\n" + end + "a\u2028b\x00\"\\\t\x1f\x7f\u00e9<&>: \ufeff"},
		{"CR", hook("", "a\r\n"), front + "X-Relay-Body: base64\nContent-Length: 4\n" + end + "YQ0K"},
		{"not UTF-8", hook("", "\xff\x00\xfe", Header{"A", []string{"b"}}), front + "A: b\nX-Relay-Body: base64\nContent-Length: 4\n" + end + "/wD+"},
		{"surrogates are not UTF-8", hook("", "\xed\xa0\x80"), front + "X-Relay-Body: base64\nContent-Length: 4\n" + end + "7aCA"},
		{"raw target", &Webhook{ID: "r-1", Method: "PURGE", Path: "/webhooks/ci/\xe9%2F", Query: "?\xff;%zz=", Time: wireTime, Mode: modeAccept},
			"PURGE /webhooks/ci/\u00e9%2F?\u00ff;%zz= HTTP/1.1\nContent-Length: 0\n" + end},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := eventOf("ci", tc.w)
			m := onlyMessage(t, block(e.chunk))
			if m.name != "webhook" || m.id != "r-1" || string(m.data) != tc.want {
				t.Errorf("event %q %q\n%q, want\n%q", m.name, m.id, m.data, tc.want)
			}
			lines := strings.Split(strings.TrimSuffix(frameOf(e), "\n\n"), "\n")
			if lines[0] != "id: r-1" || lines[1] != "event: webhook" {
				t.Errorf("block begins %q", lines[:2])
			}
			if lines := lines[2:]; strings.Join(lines, "\n") != strings.Replace("data: "+strings.ReplaceAll(tc.want, "\n", "\ndata: "), "\ndata: \n", "\ndata:\n", 1) {
				t.Errorf("block has the lines %q", lines)
			}
			if want := fmt.Sprintf("%08x\r\n%s\r\n", len(frameOf(e)), frameOf(e)); string(e.chunk) != want {
				t.Errorf("chunk %q", e.chunk)
			}
			if e.ID != "r-1" || e.Channel != "ci" || e.Mode != tc.w.Mode || e.Only != "" {
				t.Errorf("event %q %q %q %q", e.ID, e.Channel, e.Mode, e.Only)
			}
		})
	}
}

// TestLegacyShape holds what readers get that announce nothing.
func TestLegacyShape(t *testing.T) {
	hook := func(query string, body string, headers ...Header) *Webhook {
		return &Webhook{ID: "r-1", Method: "POST", Path: "/webhooks/ci/p", Query: query, Headers: headers, Body: []byte(body), Time: wireTime, Mode: modeStatus, Timeout: time.Second}
	}
	shape := func(headers, target, query, body string) string {
		path, _, _ := strings.Cut(target, "?")
		return `{"headers":{` + headers + `},"originalUrl":"` + target + `","path":"` + path + `","query":{` + query + `}` + body + `,"timestamp":1700000000000}`
	}
	const plain = "/webhooks/ci/p"
	for _, tc := range []struct {
		name string
		w    *Webhook
		want string
	}{
		{"plain", hook("", "{}", Header{"Content-Type", []string{"application/json"}}, Header{"Host", []string{"h:1"}}),
			shape(`"content-length":"2","content-type":"application/json","host":"h:1"`, plain, "", `,"body":"{}"`)},
		{"empty body", hook("", ""), shape(`"content-length":"0"`, plain, "", `,"body":""`)},
		{"latin1 values", hook("", "", Header{"X-A", []string{"caf\xe9 \x80\xff\t."}}), shape("\"content-length\":\"0\",\"x-a\":\"caf\u00e9 \u0080\u00ff\\t.\"", plain, "", `,"body":""`)},
		{"repeated header", hook("", "", Header{"X-Dup", []string{"one", "two", "one"}}), shape(`"content-length":"0","x-dup":["one","two","one"]`, plain, "", `,"body":""`)},
		{"set-cookie is an array even alone", hook("", "", Header{"Set-Cookie", []string{"a=b"}}), shape(`"content-length":"0","set-cookie":["a=b"]`, plain, "", `,"body":""`)},
		{"text of any kind", hook("", "a\x00\"\\\n\r\t\x7f\u00e9<&>"), shape(`"content-length":"13"`, plain, "", `,"body":"a\u0000\"\\\n\r\t`+"\x7f\u00e9"+`<&>"`)},
		{"not UTF-8", hook("", "\xff\x00\xfe", Header{"A", []string{"b"}}), shape(`"a":"b"`, plain, "", `,"bodyBase64":"/wD+"`)},
		{"query", hook("?b=2&a=1&b=3&c&&d=x=y", ""), shape(`"content-length":"0"`, plain+"?b=2&a=1&b=3&c&&d=x=y", `"a":"1","b":["2","3"],"c":"","d":"x=y"`, `,"body":""`)},
		{"query is split at & only", hook("?labels=bug;urgent&n=1", ""), shape(`"content-length":"0"`, plain+"?labels=bug;urgent&n=1", `"labels":"bug;urgent","n":"1"`, `,"body":""`)},
		{"query that cannot be decoded", hook("?x=1;y=2&sig=%zz&e=%ff&a+b=%C3%A9+c", ""),
			shape(`"content-length":"0"`, plain+"?x=1;y=2&sig=%zz&e=%ff&a+b=%C3%A9+c", `"a b":"é c","e":"%ff","sig":"%zz","x":"1;y=2"`, `,"body":""`)},
		{"bytes above ASCII in the target", hook("?\xff=\xe9", ""), shape(`"content-length":"0"`, plain+"?\u00ff=\u00e9", "\"\u00ff\":\"\u00e9\"", `,"body":""`)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := eventOf("ci", tc.w)
			first := e.chunkFor(false)
			if want := "id: r-1\ndata: " + tc.want + "\n\n"; string(block(first)) != want {
				t.Errorf("frame\n%q, want\n%q", block(first), want)
			}
			if second := e.chunkFor(false); &first[0] != &second[0] {
				t.Error("made a second time")
			}
			if !json.Valid(onlyMessage(t, block(first)).data) {
				t.Error("data is not JSON")
			}
			if over, err := openEvent("ci", e.repeat(testReplica, 2, "s").message()); err != nil || legacyFrame(over) != string(block(first)) {
				t.Errorf("another replica makes %q, %v", legacyFrame(over), err)
			}
		})
	}
	if heartbeatEvent.chunkFor(false) == nil || legacyFrame(heartbeatEvent) != frameOf(heartbeatEvent) {
		t.Error("the relay's own events have one form")
	}
}

// headersOf reads "name: value" lines as a server captures them: names are
// tokens in canonical form, values are any bytes without LF.
func headersOf(lines string) map[string][]string {
	h := map[string][]string{}
	for line := range strings.SplitSeq(lines, "\n") {
		name, value, _ := strings.Cut(line, ":")
		if isToken(name) {
			name = textproto.CanonicalMIMEHeaderKey(name)
			h[name] = append(h[name], strings.TrimSpace(value))
		}
	}
	return h
}

func eventOf(channel string, w *Webhook) *Event {
	e, _ := newEvent(channel, testReplica, w, nil)
	return e
}

// byAnybody reads a block as a program does that knows nothing of ours: the
// HTML standard's algorithm, then net/http. The bytes above 0x7F that a head
// has are code points there.
func byAnybody(t testing.TB, frame []byte) *Webhook {
	t.Helper()
	events := byTheBook(frame)
	if len(events) != 1 || events[0].name != "webhook" {
		t.Fatalf("%q is no webhook by the book", frame)
	}
	plain := func(s string) string {
		b, ok := latin1(s)
		if !ok {
			t.Fatalf("%q has a code point that is no byte", s)
		}
		return b
	}
	r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(events[0].data)))
	if err != nil {
		t.Fatalf("%q: %v", events[0].data, err)
	}
	w := &Webhook{ID: events[0].id, Method: r.Method}
	w.Path, w.Query, _ = strings.Cut(plain(r.RequestURI), "?")
	if len(w.Path) < len(plain(r.RequestURI)) {
		w.Query = "?" + w.Query
	}
	if w.Body, err = io.ReadAll(r.Body); err != nil {
		t.Fatal(err)
	}
	if r.Header.Get("X-Relay-Body") == "base64" {
		if w.Body, err = base64.StdEncoding.DecodeString(string(w.Body)); err != nil {
			t.Fatal(err)
		}
	}
	mode, timeout, _ := strings.Cut(r.Header.Get("X-Relay-Respond"), "; timeout=")
	ms, _ := strconv.ParseInt(timeout, 10, 64)
	w.Mode, w.Timeout = mode, time.Duration(ms)*time.Millisecond
	ms, _ = strconv.ParseInt(r.Header.Get("X-Relay-Time"), 10, 64)
	w.Time = time.UnixMilli(ms)
	if r.Host != "" {
		r.Header["Host"] = []string{r.Host}
	}
	for _, values := range r.Header {
		for i := range values {
			values[i] = plain(values[i])
		}
	}
	w.Headers = endToEnd(r.Header)
	return w
}

// payloads are bodies as they come, and as nobody should send them.
func payloads() [][]byte {
	return [][]byte{
		nil, []byte("{}"), githubBody(10 << 10), []byte(everyByte), []byte(everyByte[:0x80]), []byte("payload=%7B%7D&b=x+y"),
		[]byte("\n"), []byte("\n\n\n"), []byte("a\n"), []byte("\na"), []byte("\r"), []byte("a\r\nb"), []byte("\ufeff{}"), []byte("data: x\n\nevent: ready\ndata: {}\n\n"),
		[]byte("POST / HTTP/1.1\n\n"), bytes.Repeat([]byte("\n"), 17<<10), bytes.Repeat([]byte("\n"), 40<<10), bytes.Repeat([]byte{1}, 17<<10), []byte("\u2028\x7f\x00"),
	}
}

// FuzzWebhook states what the wire is for: what a server captured arrives,
// byte for byte, on the first delivery, on every later one, and over another
// replica; to our client, and to whoever reads by the book.
func FuzzWebhook(f *testing.F) {
	f.Add("POST", "/webhooks/ci/p?x=1;y=2&sig=%zz", "x-dup: one\nx-dup: two\nset-cookie: a\nauthorization: Bearer x", []byte(`{"a":"\u2028 é"}`), uint8(2), int64(9000), uint64(1))
	f.Add("PATCH", "/webhooks/x//y%2Fz/\xe9?", "x-bytes: \x80\xff\t!", []byte("\x00\r\n\xff"), uint8(1), int64(-1), uint64(2))
	f.Add("delete", "/webhooks/x/../y", "connection: x-a\nx-a: gone\nx-relay-event-id: forged\ncontent-length: 7", []byte(nil), uint8(0), int64(math.MaxInt64), uint64(3))
	f.Add("G ET", "http://evil/a b?c d", "a: \x00", []byte("\u2028\x7f"), uint8(0), int64(0), uint64(4))
	f.Add("PUT", "/webhooks/ci", "host: a\nx-empty:\npragma: no-cache\nx-all: "+everyByte[0x80:], []byte("x"), uint8(0), int64(0), uint64(5))
	f.Add("POST", "/webhooks/ci", "", []byte("x"), uint8(2), int64(math.MaxInt64), uint64(6))
	f.Add(strings.Repeat("m", 2000), "/webhooks/ci", "", []byte("x"), uint8(0), int64(0), uint64(7))
	for i, body := range payloads() {
		f.Add("POST", "/webhooks/ci", "content-type: application/json\nhost: relay.example.com", body, uint8(i), int64(i), uint64(i))
	}
	f.Fuzz(func(t *testing.T, method, raw, lines string, body []byte, mode uint8, ms int64, seed uint64) {
		w := &Webhook{
			ID: newID(testReplica), Method: method, Headers: endToEnd(headersOf(lines)), Body: body, Time: wireTime,
			Mode: []string{modeAccept, modeStatus, modeResponse}[mode%3], Timeout: time.Duration(ms),
		}
		to, err := parseTarget(raw)
		if err != nil || to.webhook() != nil || !isToken(method) || checkHeaders(w.Headers) != nil || len(lines)+len(raw) > 16<<10 {
			t.Skip("no server takes such a request")
		}
		w.Path, w.Query = to.Path, to.Query
		e := eventOf(to.Channel, w)
		if len(e.wire) > w.wireSize(isText(w.Body))+len(to.Channel) {
			t.Fatalf("%d bytes on the wire, %d foreseen", len(e.wire), w.wireSize(isText(w.Body)))
		}
		over, err := openEvent(to.Channel, e.wire)
		if err != nil || over.ID != e.ID || over.Mode != w.Mode || over.Holder != testReplica || over.Only != "" || !bytes.Equal(over.chunk, e.chunk) {
			t.Fatalf("event over a replica: %+v, %v", over, err)
		}
		if _, err := openEvent(to.Channel+"x", e.wire); err == nil {
			t.Fatal("an event of another channel is taken")
		}
		before := bytes.Clone(e.chunk)
		again := e.repeat("other", 7, "client")
		if over, err := openEvent(to.Channel, again.message()); err != nil || over.Only != "client" || over.Holder != "other" || over.Round != 7 || over.ID != e.ID || over.Mode != w.Mode || !bytes.Equal(over.chunk, before) || !bytes.Equal(e.chunk, before) {
			t.Fatalf("later delivery over a replica: %+v, %v", over, err)
		}

		want := *w
		if want.Timeout = 0; respond(w.Mode) {
			want.Timeout = min(max(w.Timeout.Truncate(time.Millisecond), 0), maxResponseTimeout)
		}
		whole, err := parsed(&choppy{bytes.Clone(block(e.chunk)), mathrand.New(mathrand.NewPCG(seed, 0))})
		if err != io.EOF || len(whole) != 1 || formed(whole) != formed(byTheBook(block(e.chunk))) {
			t.Fatalf("in pieces:\n%s(%v)", formed(whole), err)
		}
		got, err := decodeWebhook(to.Channel, whole[0].id, whole[0].data)
		if err != nil {
			t.Fatalf("decode %q: %v", whole[0].data, err)
		}
		sameWebhook(t, got, &want)
		if !slices.ContainsFunc(w.Headers, func(h Header) bool {
			return h.Name == "Pragma" || h.Name == "Host" && (len(h.Values) > 1 || h.Values[0] == "")
		}) {
			anybody := byAnybody(t, block(e.chunk)) // net/http adds to Pragma, and keeps one Host
			anybody.Timeout = want.Timeout
			sameWebhook(t, anybody, &want)
		}

		// The legacy form, for what it can tell.
		legacy := onlyMessage(t, block(e.chunkFor(false)))
		if legacy.name != "message" || legacy.id != w.ID || !json.Valid(legacy.data) {
			t.Fatalf("legacy event %q %q %q", legacy.name, legacy.id, legacy.data)
		}
		if got, err = decodeLegacy(to.Channel, legacy.data); err != nil {
			t.Fatalf("decode %q: %v", legacy.data, err)
		}
		want.ID, want.Method, want.Mode, want.Timeout = "", "POST", "", 0
		if !utf8.Valid(body) {
			want.Body = nil
		}
		sameWebhook(t, got, &want)
	})
}

// FuzzDecodeWebhook: whatever stands in an event, it is either sound or refused.
func FuzzDecodeWebhook(f *testing.F) {
	for _, body := range payloads() {
		w := pushHook()
		w.Body = body
		f.Add(onlyMessage(f, block(eventOf("github", w).chunk)).data)
	}
	f.Add([]byte("POST /webhooks/github HTTP/1.1\n\n"))
	f.Add([]byte("GET http://h/webhooks/github/x?y HTTP/1.1\nContent-Length: 0\nA:b\na:  c\t\n\n"))
	f.Add([]byte("\n\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, decode := range []func() (*Webhook, error){
			func() (*Webhook, error) { return decodeWebhook("github", testID, data) },
			func() (*Webhook, error) { return decodeLegacy("github", data) },
		} {
			w, err := decode()
			if err != nil {
				continue
			}
			target, err := parseTarget(w.Path + w.Query)
			if err != nil || target.webhook() != nil || target.Channel != "github" || !isToken(w.Method) || checkHeaders(w.Headers) != nil {
				t.Fatalf("%q became %+v", data, w)
			}
			for _, h := range w.Headers {
				if hopByHop[h.Name] || relaysOwn(h.Name) || h.Name != textproto.CanonicalMIMEHeaderKey(h.Name) {
					t.Fatalf("%q brought %q", data, h.Name)
				}
			}
			if w.Timeout < 0 || w.Timeout > maxResponseTimeout {
				t.Fatalf("%q has a timeout of %s", data, w.Timeout)
			}
			// What was accepted goes on as it is.
			w.ID = testID
			again := opened(t, block(eventOf("github", w).chunk))
			if w.Timeout = w.Timeout.Truncate(time.Millisecond); !respond(w.Mode) {
				w.Timeout = 0
			}
			sameWebhook(t, again, w)
		}
	})
}

// TestSizes: the forms of hostile bodies are not much larger than the bodies.
func TestSizes(t *testing.T) {
	const size = 3 << 20
	for _, tc := range []struct {
		name string
		body []byte
		most int // bytes of the chunk, besides the head
	}{
		{"text", bytes.Repeat([]byte("a"), size), size},
		{"control characters", bytes.Repeat([]byte{1}, size), size},
		{"NUL", make([]byte, size), size},
		{"newlines", bytes.Repeat([]byte("\n"), size), base64.StdEncoding.EncodedLen(size)},
		{"short lines", bytes.Repeat([]byte("a\n"), size/2), base64.StdEncoding.EncodedLen(size)},
		{"lines of 30", bytes.Repeat([]byte("aaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n"), size/30), size + 6*size/30},
		{"binary", bytes.Repeat([]byte{0xff}, size), base64.StdEncoding.EncodedLen(size)},
		{"CR", bytes.Repeat([]byte("\r"), size), base64.StdEncoding.EncodedLen(size)},
	} {
		w := pushHook()
		w.Body = tc.body
		e := eventOf("github", w)
		if n := len(e.chunk); n > tc.most+1<<10 {
			t.Errorf("%s: %d bytes are %d on the stream, want %d and a head", tc.name, len(tc.body), n, tc.most)
		}
		if foreseen := w.wireSize(isText(w.Body)); len(e.wire) > foreseen || foreseen > len(e.wire)+4<<10 {
			t.Errorf("%s: %d bytes, %d foreseen", tc.name, len(e.wire), foreseen)
		}
		if got := opened(t, block(e.chunk)); !bytes.Equal(got.Body, tc.body) {
			t.Errorf("%s: another body arrived", tc.name)
		}
	}
}

// FuzzOpenEnvelope feeds what may come over Redis, from another version or
// from anybody who can publish there.
func FuzzOpenEnvelope(f *testing.F) {
	sig := Signal{
		Kind: signalReceipt, To: "a", From: "b", Channel: "c", Event: "d", Subscriber: "e", Client: "f", Data: []byte("g"), Round: 3,
		Given: []Given{{"s1", "c1"}, {"s2", ""}},
	}
	f.Add(sig.encode())
	f.Add(eventOf("ci", &Webhook{ID: "r-1", Method: "POST", Path: "/x", Mode: modeStatus, Timeout: time.Second}).repeat("r", 2, "s").message())
	f.Add([]byte{})
	f.Add([]byte{envelopeVersion})
	f.Add([]byte{envelopeVersion, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Add([]byte{2, 0, 0, 0})
	same := func(t *testing.T, sig Signal) {
		t.Helper()
		if again, err := openSignal(sig.encode()); err != nil || !reflect.DeepEqual(again, sig) {
			t.Fatalf("signal %+v came back as %+v, %v", sig, again, err)
		}
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		if e, err := openEvent("ci", wire); err == nil {
			again, err := openEvent("ci", append(e.appendEnvelope(nil), e.chunk...))
			if err != nil || again.ID != e.ID || again.Only != e.Only || again.Mode != e.Mode || again.Holder != e.Holder || again.Round != e.Round ||
				again.Until.IsZero() != e.Until.IsZero() || !bytes.Equal(again.chunk, e.chunk) {
				t.Fatalf("event %+v came back as %+v, %v", e, again, err)
			}
		}
		if sig, err := openSignal(wire); err == nil {
			same(t, sig)
		}
		// Any strings make the round trip, whatever they hold.
		s := string(wire)
		same(t, Signal{Kind: s, To: s, From: "x", Channel: s, Event: "", Subscriber: s, Client: s, Data: []byte(s), Round: len(s), Given: []Given{{s, ""}, {"", s}}})
	})
}

// TestEnvelopeVersion: a replica of a later version must not be misread.
func TestEnvelopeVersion(t *testing.T) {
	e := eventOf("ci", &Webhook{ID: "r-1", Method: "POST", Path: "/x"})
	sig := Signal{Kind: signalReady}
	for _, version := range []byte{0, envelopeVersion - 1, envelopeVersion + 1, 255} {
		wire, signal := bytes.Clone(e.wire), sig.encode()
		wire[0], signal[0] = version, version
		if _, err := openEvent("ci", wire); err == nil {
			t.Errorf("event of version %d was opened", version)
		}
		if _, err := openSignal(signal); err == nil {
			t.Errorf("signal of version %d was opened", version)
		}
	}
	for n := range len(e.wire) - len(e.chunk) {
		if _, err := openEvent("ci", e.wire[:n]); err == nil {
			t.Errorf("the first %d bytes of an envelope were opened", n)
		}
	}
}

func TestEndToEnd(t *testing.T) {
	for _, tc := range []struct{ name, lines, want string }{
		{"nothing", "", ""},
		{"sorted by name, values in order", "B: 2\nA: z\nB: 1", "A: z\nB: 2\nB: 1"},
		{"named in Connection", "Connection: close, X-One ,x-two\nConnection: x-three\nX-One: 1\nX-Two: 2\nX-Three: 3\nX-Four: 4", "X-Four: 4"},
		{"named in Connection, the relay's own list stays", "Connection: ,,\nAccept: a", "Accept: a"},
		{"the fixed list", "Connection: x\nProxy-Connection: x\nKeep-Alive: x\nTE: x\nTransfer-Encoding: chunked\nUpgrade: h2c\nTrailer: x\nProxy-Authenticate: x\nProxy-Authorization: x\nContent-Length: 1\nExpect: 100-continue\nTe-X: 1", "Te-X: 1"},
		{"the relay's own names", "X-Relay-Event-Id: forged\nx-relay-anything: 1\nX-RELAY-CLIENT: x\nX_Relay_Event_Id: forged\nx_relay-a: 1\nX-Relayed: 1", "X-Relayed: 1"},
		{"everything else", "Authorization: Bearer t\nCookie: a=b\nX-Forwarded-For: 10.0.0.1\nEmpty:", "Authorization: Bearer t\nCookie: a=b\nEmpty: \nX-Forwarded-For: 10.0.0.1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := headersOf(tc.lines)
			in["No-Values"] = nil
			var got []string
			for _, h := range endToEnd(in) {
				for _, v := range h.Values {
					got = append(got, h.Name+": "+v)
				}
			}
			if joined := strings.Join(got, "\n"); joined != tc.want {
				t.Errorf("got\n%s\nwant\n%s", joined, tc.want)
			}
		})
	}
}

var pathCases = []struct {
	path string
	ok   bool
}{
	{"/", true}, {"/a", true}, {"/a/", true}, {"//a//", true}, {"/a%2Fb", true}, {"/a%2f%2Fb", true}, {"/%25", true}, {"/a;v=1/b", true},
	{"/...", true}, {"/.a", true}, {"/a.", true}, {"/..a", true}, {"/a..", true}, {"/.well-known/x", true}, {"/a%20b", true}, {"/\xe9%e9", true},
	{"/%252e%252e/x", true}, {"/a..;x/b", true}, {"/a?b", true}, {"/@evil", true}, {"/http://evil/", true}, {"/%40", true}, {"/:80", true},
	{"", false}, {"a", false}, {"?x", false}, {"*", false}, {"http://h/", false},
	{"/..", false}, {"/.", false}, {"/../x", false}, {"/a/../b", false}, {"/a/./b", false}, {"/a/..", false}, {"/a//../b", false},
	{"/%2e%2e/x", false}, {"/%2E./x", false}, {"/.%2e", false}, {"/%2e", false}, {"/a%2f..%2fb", false}, {"/a%2F%2e%2E", false}, {"/..%2fx", false},
	{"/..;/x", false}, {"/..;a=b/x", false}, {"/.;/x", false}, {"/..%3bx/y", false}, {"/%2e%2e;x", false}, {"/a%2f..;b", false},
	{"/\\", false}, {"/a\\..\\b", false}, {"/%5c", false}, {"/a%5C..%5Cb", false},
	{"/\x00", false}, {"/%00", false}, {"/a\r\nb", false}, {"/%0d%0a", false}, {"/%0A", false}, {"/\t", false}, {"/%7f", false}, {"/\x7f", false}, {"/%1F", false},
	{"/%", false}, {"/%2", false}, {"/%zz", false}, {"/a%2", false},
	{"/..#/a", false}, {"/..%23", false}, {"/..%3fa", false}, {"/.#", false}, {"/a#..", true}, {"/a#b/c", true},
	{"/a b", false}, {"/ HTTP/1.1", false}, // a space ends the request target
}

func TestCheckPath(t *testing.T) {
	for _, tc := range pathCases {
		if err := checkPath(tc.path); (err == nil) != tc.ok {
			t.Errorf("checkPath(%q) = %v, want accepted %v", tc.path, err, tc.ok)
		}
	}
}

// confined tells whether path stays below base in every reading that a target
// may give it: as it is, with backslashes for slashes, without parameters.
func confined(base, p string) bool {
	within := func(p string) bool {
		p = path.Clean(p)
		return base == "" || p == base || strings.HasPrefix(p, base+"/")
	}
	// An empty base is the root, which Clean never leaves: only a dot segment shows there.
	climbs := func(p string) bool { return slices.Contains(strings.Split(p, "/"), "..") }
	decoded, err := url.PathUnescape(p)
	if err != nil {
		return false
	}
	slashed := strings.ReplaceAll(decoded, `\`, "/")
	var bare []string
	for segment := range strings.SplitSeq(slashed, "/") {
		if i := strings.IndexAny(segment, ";?#"); i >= 0 {
			segment = segment[:i]
		}
		bare = append(bare, segment)
	}
	for _, reading := range []string{p, decoded, slashed, strings.Join(bare, "/")} {
		if !within(base+reading) || climbs(reading) {
			return false
		}
	}
	return true
}

// FuzzCheckPath: what is accepted never leaves the prefix it is appended to,
// and fits into a request line.
func FuzzCheckPath(f *testing.F) {
	for _, tc := range pathCases {
		f.Add(tc.path)
	}
	f.Fuzz(func(t *testing.T, p string) {
		if checkPath(p) != nil {
			return
		}
		for _, base := range []string{"", "/base", "/a/b"} {
			if !confined(base, p) {
				t.Fatalf("%q leaves %q", p, base)
			}
		}
		if strings.ContainsAny(p, " \t\r\n") {
			t.Fatalf("%q breaks a request line", p)
		}
	})
}

// TestParseTarget: one reading, byte for byte, of the two forms that are
// requests to us; everything else is an error.
func TestParseTarget(t *testing.T) {
	for _, tc := range []struct{ target, path, query, kind, channel, tail string }{
		{"/", "/", "", "", "", ""},
		{"/a", "/a", "", "a", "", ""},
		{"/a?", "/a", "?", "a", "", ""},
		{"/a?b?c", "/a", "?b?c", "a", "", ""},
		{"/?/webhooks/ci", "/", "?/webhooks/ci", "", "", ""},
		{"/webhooks", "/webhooks", "", "webhooks", "", ""},
		{"/webhooks/", "/webhooks/", "", "webhooks", "", ""},
		{"/webhooks/ci", "/webhooks/ci", "", "webhooks", "ci", ""},
		{"/webhooks/ci/", "/webhooks/ci/", "", "webhooks", "ci", "/"},
		{"/webhooks/ci?/x", "/webhooks/ci", "?/x", "webhooks", "ci", ""},
		{"/webhooks/ci//a%2Fb?c/d", "/webhooks/ci//a%2Fb", "?c/d", "webhooks", "ci", "//a%2Fb"},
		{"/webhooks//ci", "/webhooks//ci", "", "webhooks", "", "/ci"},
		{"//a//?//", "//a//", "?//", "", "a", "//"},
		{"//webhooks/ci", "//webhooks/ci", "", "", "webhooks", "/ci"},
		{"/webhooks%2Fci/x", "/webhooks%2Fci/x", "", "webhooks%2Fci", "x", ""},
		{"/webhooks/c%69/x", "/webhooks/c%69/x", "", "webhooks", "c%69", "/x"},
		{"/webhooks/ci#/x", "/webhooks/ci#/x", "", "webhooks", "ci#", "/x"},
		{"/a?u=http://h/x", "/a", "?u=http://h/x", "a", "", ""},
		{"/http://h/x", "/http://h/x", "", "http:", "", "/h/x"},
		{"http://h/x?y", "/x", "?y", "x", "", ""},
		{"HTTPS://user@h:1/webhooks/x%2Fy?", "/webhooks/x%2Fy", "?", "webhooks", "x%2Fy", ""},
		{"http://h//x", "//x", "", "", "x", ""},
		{"http://[::1]:80/webhooks/ci/x?y", "/webhooks/ci/x", "?y", "webhooks", "ci", "/x"},
		{"http://h/a://b/c", "/a://b/c", "", "a:", "", "/b/c"},
	} {
		got, err := parseTarget(tc.target)
		if want := (requestTarget{tc.path, tc.query, tc.kind, tc.channel, tc.tail}); err != nil || got != want {
			t.Errorf("parseTarget(%q) = %+v, %v, want %+v", tc.target, got, err, want)
		}
	}
	for _, target := range []string{
		"", "*", "h", "h:443", "h/webhooks/ci", "webhooks/ci", "?/webhooks/ci", "#/webhooks/ci",
		"http://h", "http://h?x=/y", "http://h#/x", "http:///webhooks/ci", "http://?/webhooks/ci", "http://", "://h/webhooks/ci",
		"http:/webhooks/ci?://h/x", "http:webhooks/ci", "http:/webhooks/ci", "zz:/webhooks/ci?://h/x", "zz://h/webhooks/ci", "ftp://h/webhooks/ci",
		"file:///webhooks/ci", "ws://h/webhooks/ci", "evil/webhooks/ci/x://h/run", " http://h/webhooks/ci", "http ://h/webhooks/ci", "http%3a//h/webhooks/ci",
	} {
		if got, err := parseTarget(target); err == nil {
			t.Errorf("parseTarget(%q) = %+v", target, got)
		}
	}
}

func TestCharacters(t *testing.T) {
	const tokens = "!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" // RFC 9110 section 5.6.2
	const names = "-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"             // RFC 3986 section 2.3
	for c := range 256 {
		s := string([]byte{byte(c)})
		if got, want := isToken(s), strings.Contains(tokens, s); got != want {
			t.Errorf("token(%q) = %v", s, got)
		}
		if got, want := validName(s), strings.Contains(names, s) && s != "."; got != want {
			t.Errorf("validName(%q) = %v", s, got)
		}
		value := []Header{{"X", []string{"ok", "a" + s + "b"}}}
		if got, want := checkHeaders(value) == nil, c == '\t' || c >= ' ' && c != 0x7f; got != want {
			t.Errorf("checkHeaders with value byte %q accepts: %v", s, got)
		}
		name := []Header{{"X" + s, []string{"v"}}}
		if got, want := checkHeaders(name) == nil, strings.Contains(tokens, s); got != want {
			t.Errorf("checkHeaders with name byte %q accepts: %v", s, got)
		}
		if back, ok := latin1(string(rune(c))); !ok || back != s {
			t.Errorf("latin1(%q) = %q, %v", rune(c), back, ok)
		}
	}
	for s, want := range map[string]bool{"": false, strings.Repeat("a", 128): true, strings.Repeat("a", 129): false, "notReady": true, "@all": false} {
		if validName(s) != want {
			t.Errorf("validName(%q) is not %v", s, want)
		}
	}
	if isToken("") {
		t.Error("an empty token")
	}
	for _, s := range []string{"\u0100", "abc\u2028", "\U0001F600"} {
		if back, ok := latin1(s); ok {
			t.Errorf("latin1(%q) = %q", s, back)
		}
	}
}

// canary stands where a payload would: no error may quote it.
const canary = "CANARY"

// TestDecodeHostile: whatever a stream says, in whichever form, an event is
// either sound or refused, with a reason that quotes none of it.
func TestDecodeHostile(t *testing.T) {
	sound := func(t *testing.T, w *Webhook, err error, ok bool) {
		t.Helper()
		if (err == nil) != ok {
			t.Fatalf("decoded %+v, %v, want accepted %v", w, err, ok)
		}
		if err != nil && (strings.Contains(err.Error(), canary) || strings.Contains(err.Error(), "12345")) {
			t.Errorf("error quotes the event: %v", err)
		}
		if err != nil {
			return
		}
		if target, err := parseTarget(w.Path + w.Query); err != nil || target.webhook() != nil || target.Channel != "ci" || !isToken(w.Method) || checkHeaders(w.Headers) != nil {
			t.Errorf("accepted but unsound: %+v", w)
		}
		for _, h := range w.Headers {
			if hopByHop[h.Name] || relaysOwn(h.Name) {
				t.Errorf("%s crossed the relay", h.Name)
			}
		}
	}
	many := strings.Repeat("X-Many: 1\n", fieldLimit)
	const line, empty = "POST /webhooks/ci/x HTTP/1.1\n", "Content-Length: 0\n\n"
	for _, tc := range []struct {
		name, data string
		ok         bool
	}{
		{"least", line + empty, true},
		{"absolute form", "PUT http://evil/webhooks/ci/x?y HTTP/1.1\n" + empty, true},
		{"lower case, no blank, more blanks", line + "content-length:  1 \t\nx-a:b\n\nx", true},
		{"framing of the first hop", line + "Transfer-Encoding: chunked\nConnection: close, x-a\nX-A: 1\nUpgrade: h2c\nExpect: 100-continue\n" + empty, true},
		{"unknown fields of the relay", line + "X-Relay-New: 1\nX-Relay-Respond: later; timeout=x; y\nX-Relay-Time: x\nX-Relay-Body: zip\n" + empty, true},
		{"many fields", line + many + empty, true},
		{"a large field", line + "X-A: " + strings.Repeat("v", headLimit-200) + "\n" + empty, true},

		{"nothing", "", false},
		{"empty lines", "\n\n\n", false},
		{"cut in the head", line + "Content-Length: 0\n", false},
		{"JSON", `{"originalUrl":"/webhooks/ci/CANARY"}` + "\n\n", false},
		{"no version", "POST /webhooks/ci/CANARY\n" + empty, false},
		{"HTTP/1.0", "POST /webhooks/ci/CANARY HTTP/1.0\n" + empty, false},
		{"a response", "HTTP/1.1 200 CANARY\n" + empty, false},
		{"no method", " /webhooks/ci/CANARY HTTP/1.1\n" + empty, false},
		{"method that is none", "G(T /webhooks/ci/CANARY HTTP/1.1\n" + empty, false},
		{"code point above latin1", "POST /webhooks/ci/CANARY\u0100 HTTP/1.1\n" + empty, false},
		{"code point above latin1 in a field", line + "X-A: CANARY\u2028\n" + empty, false},
		{"too many fields", line + many + strings.Repeat("X-A: CANARY\n", ownFields) + empty, false},
		{"too large a head", line + "X-A: " + strings.Repeat("v", headLimit) + "\n" + empty, false},
		{"too large a head before any line end", strings.Repeat("v", 2*headLimit), false},

		{"no length", line + "X-A: 1\n\n", false},
		{"length too small", line + "Content-Length: 0\n\nCANARY", false},
		{"length too large", line + "Content-Length: 12345\n\nCANARY", false},
		{"length with a sign", line + "Content-Length: +6\n\nCANARY", false},
		{"length with a zero", line + "Content-Length: 06\n\nCANARY", false},
		{"length that is a list", line + "Content-Length: 6, 6\n\nCANARY", false},
		{"two lengths, the wrong one first", line + "Content-Length: 5\nContent-Length: 6\n\nCANARY", false},
		{"broken base64", line + "X-Relay-Body: base64\nContent-Length: 7\n\nCANARY!", false},
		{"line without a colon", line + "CANARY\n" + empty, false},
		{"blank before the colon", line + "X-CANARY : 1\n" + empty, false},
		{"folded", line + "X-A: 1\n CANARY\n" + empty, false},
		{"no name", line + ": CANARY\n" + empty, false},
		{"NUL in a name", line + "X\x00: CANARY\n" + empty, false},
		{"NUL in a field", line + "X-A: CANARY\x00\n" + empty, false},
		{"CR in a field", line + "X-A: CANARY\rX-B: 1\n" + empty, false},

		{"authority without path", "POST http://CANARY HTTP/1.1\n" + empty, false},
		{"asterisk", "OPTIONS * HTTP/1.1\n" + empty, false},
		{"authority form", "CONNECT CANARY:80 HTTP/1.1\n" + empty, false},
		{"dot segments", "POST /webhooks/ci/CANARY/../../x HTTP/1.1\n" + empty, false},
		{"dot segments, escaped", "POST /webhooks/ci/CANARY/%2e%2E/x HTTP/1.1\n" + empty, false},
		{"dot segments behind an authority", "POST http://evil/webhooks/ci/../CANARY HTTP/1.1\n" + empty, false},
		{"backslash", "POST /webhooks/ci/CANARY\\x HTTP/1.1\n" + empty, false},
		{"another channel", "POST /webhooks/other/CANARY HTTP/1.1\n" + empty, false},
		{"outside", "POST /CANARY HTTP/1.1\n" + empty, false},
		{"CR in the path", "POST /webhooks/ci/CANARY\r HTTP/1.1\n" + empty, false},
		{"NUL in the query", "POST /webhooks/ci/x?CANARY\x00 HTTP/1.1\n" + empty, false},
		{"two targets", "POST /webhooks/ci/x /webhooks/ci/CANARY HTTP/1.1\n" + empty, false},
		{"blank in the query", "POST /webhooks/ci/x?a CANARY HTTP/1.1\n" + empty, false},
		{"two versions", "POST /webhooks/ci/CANARY HTTP/1.1 HTTP/1.1\n" + empty, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, err := decodeWebhook("ci", testID, []byte(tc.data))
			sound(t, w, err, tc.ok)
		})
	}
	for id, ok := range map[string]bool{
		testID: true, "a": true, "": false, "CANARY/../x": false, "CANARY\r": false, strings.Repeat("x", 129): false, "..": false, "CANARY ": false,
	} {
		w, err := decodeWebhook("ci", id, []byte(line+empty))
		sound(t, w, err, ok)
	}

	for _, tc := range []struct {
		name, data string
		ok         bool
	}{
		{"least", `{"originalUrl":"/webhooks/ci/x"}`, true},
		{"legacy", `{"headers":{"host":"127.0.0.1:3000","set-cookie":["s1","s2"],"content-length":"13"},"originalUrl":"/webhooks/ci/y?a=1","path":"/webhooks/x/y","query":{"a":"1"},"body":"{}","timestamp":1700000000000}`, true},
		{"absolute form", `{"originalUrl":"http://evil/webhooks/ci/x?y"}`, true},
		{"members that legacy servers do not send", `{"originalUrl":"/webhooks/ci/x","id":5,"method":["G T"],"respond":"x","timeout":1e99,"bodyBase64":"CANARY!","retry":1e99,"extra":{"a":[null]}}`, true},
		{"nulls", `{"originalUrl":"/webhooks/ci/x","headers":null,"body":null,"query":null,"timestamp":null}`, true},
		{"null for a value", `{"originalUrl":"/webhooks/ci/x","headers":{"x":null}}`, true},
		{"framing of the first hop", `{"originalUrl":"/webhooks/ci/x","headers":{"transfer-encoding":"chunked","content-length":"99","connection":"close","upgrade":"h2c"}}`, true},

		{"nothing", ``, false},
		{"no object", `"CANARY"`, false},
		{"array", `["CANARY"]`, false},
		{"null", `null`, false},
		{"cut", `{"originalUrl":"/webhooks/ci/CANARY`, false},
		{"two values", `{"originalUrl":"/webhooks/ci/x"} {"a":"CANARY"}`, false},
		{"no JSON", `CANARY`, false},
		{"headers is a list", `{"originalUrl":"/webhooks/ci/x","headers":["CANARY"]}`, false},
		{"header is a number", `{"originalUrl":"/webhooks/ci/x","headers":{"x":12345}}`, false},
		{"header is an object", `{"originalUrl":"/webhooks/ci/x","headers":{"x":{"CANARY":"CANARY"}}}`, false},
		{"header list holds a list", `{"originalUrl":"/webhooks/ci/x","headers":{"x":["a",["CANARY"]]}}`, false},
		{"body is an object", `{"originalUrl":"/webhooks/ci/x","body":{"CANARY":1}}`, false},
		{"timestamp is no integer", `{"originalUrl":"/webhooks/ci/x","timestamp":1e99}`, false},
		{"deep", strings.Repeat(`{"a":`, 20000) + "1" + strings.Repeat("}", 20000), false},
		{"many headers of a name", `{"originalUrl":"/webhooks/ci/x","headers":{"x":["CANARY"` + strings.Repeat(`,"a"`, fieldLimit) + `]}}`, false},
		{"large headers", `{"originalUrl":"/webhooks/ci/x","headers":{"x":"` + strings.Repeat("a", headLimit) + `"}}`, false},

		{"no target", `{}`, false},
		{"empty target", `{"originalUrl":""}`, false},
		{"authority without path", `{"originalUrl":"http://CANARY"}`, false},
		{"authority with query", `{"originalUrl":"http://CANARY?/x"}`, false},
		{"userinfo", `{"originalUrl":"@CANARY/x"}`, false},
		{"host and port", `{"originalUrl":"CANARY:80"}`, false},
		{"asterisk", `{"originalUrl":"*"}`, false},
		{"relative", `{"originalUrl":"CANARY/x"}`, false},
		{"dot segments", `{"originalUrl":"/webhooks/ci/CANARY/../../x"}`, false},
		{"dot segments, escaped", `{"originalUrl":"/webhooks/ci/CANARY/%2e%2E/x"}`, false},
		{"dot segments behind an authority", `{"originalUrl":"http://evil/webhooks/ci/../CANARY"}`, false},
		{"dot segments with parameters", `{"originalUrl":"/webhooks/ci/CANARY/..;/x"}`, false},
		{"backslash", `{"originalUrl":"/webhooks/ci/CANARY\\..\\x"}`, false},
		{"NUL in the path", `{"originalUrl":"/webhooks/ci/CANARY\u0000"}`, false},
		{"NUL in the query", `{"originalUrl":"/webhooks/ci/x?CANARY\u0000"}`, false},
		{"CRLF in the path", `{"originalUrl":"/webhooks/ci/x HTTP/1.1\r\nCANARY: 1"}`, false},
		{"CRLF in the query", `{"originalUrl":"/webhooks/ci/x?y HTTP/1.1\r\nCANARY: 1"}`, false},
		{"space in the path", `{"originalUrl":"/webhooks/ci/x HTTP/1.1"}`, false},
		{"space in the query", `{"originalUrl":"/webhooks/ci/x?CANARY HTTP/1.1"}`, false},
		{"no bytes in the path", `{"originalUrl":"/webhooks/ci/CANARY\u0100"}`, false},
		{"a path that differs does not count", `{"path":"/x","originalUrl":"/webhooks/ci/../CANARY"}`, false},

		{"CRLF in a header", `{"originalUrl":"/webhooks/ci/x","headers":{"a":"CANARY\r\nb: c"}}`, false},
		{"LF in a header list", `{"originalUrl":"/webhooks/ci/x","headers":{"a":["ok","CANARY\n"]}}`, false},
		{"NUL in a header", `{"originalUrl":"/webhooks/ci/x","headers":{"a":"CANARY\u0000"}}`, false},
		{"a header above latin1", `{"originalUrl":"/webhooks/ci/x","headers":{"a":"CANARY\u2028"}}`, false},
		{"CRLF in a header name", `{"originalUrl":"/webhooks/ci/x","headers":{"a: b\r\nc":"CANARY"}}`, false},
		{"space in a header name", `{"originalUrl":"/webhooks/ci/x","headers":{"content-length ":"CANARY"}}`, false},
		{"colon in a header name", `{"originalUrl":"/webhooks/ci/x","headers":{":path":"CANARY"}}`, false},
		{"empty header name", `{"originalUrl":"/webhooks/ci/x","headers":{"":"CANARY"}}`, false},
	} {
		t.Run("legacy "+tc.name, func(t *testing.T) {
			w, err := decodeLegacy("ci", []byte(tc.data))
			sound(t, w, err, tc.ok)
		})
	}
}

// inBothForms reads a webhook for a target, at a client of channel.
var inBothForms = map[string]func(channel, target string) (*Webhook, error){
	"HTTP": func(channel, target string) (*Webhook, error) {
		return decodeWebhook(channel, testID, []byte("POST "+target+" HTTP/1.1\nContent-Length: 0\n\n"))
	},
	"legacy": func(channel, target string) (*Webhook, error) {
		data, _ := json.Marshal(map[string]string{"originalUrl": target})
		return decodeLegacy(channel, data)
	},
}

// TestDecodeWebhookChannel: a client takes webhooks of its own channel alone,
// whatever a server sends; its path is /webhooks/{channel} or below, and nothing
// of what is refused is quoted.
func TestDecodeWebhookChannel(t *testing.T) {
	for target, ok := range map[string]bool{
		"/webhooks/ci": true, "/webhooks/ci/": true, "/webhooks/ci?x": true, "/webhooks/ci/x://h/y": true, "http://h/webhooks/ci/x": true, "HTTPS://h/webhooks/ci": true,
		"/": false, "/CANARY": false, "/admin/CANARY": false, "/webhooks": false, "/webhooks/": false, "/webhooks?/ci": false, "/webhooks//ci": false,
		"/webhooks/CANARY": false, "/webhooks/other/CANARY": false, "/webhooks/cii": false, "/webhooks/c": false, "/webhooks/CI": false, "/webhooks/ci.": false,
		"/webhooks/c%69/x": false, "/webhooks%2fci/x": false, "/%77ebhooks/ci/x": false, "/Webhooks/ci": false, "/webhooks/ci%2fx": false, "/webhooks/ci#x": false, "/webhooks/ci;x": false,
		"//webhooks/ci": false, "//h/webhooks/ci": false, "///webhooks/ci": false, "/x/webhooks/ci": false, "/subscribe/ci": false,
		"/webhooks/other/../ci/x": false, "/webhooks/ci/../other": false, "/webhooks/ci/..;/other": false, "/webhooks/./ci": false,
		"http:/webhooks/ci?://h/CANARY": false, "zz:/webhooks/ci?://h/CANARY": false, "evil/webhooks/ci/x://h/CANARY": false, "http:/webhooks/ci": false, "http:webhooks/ci": false,
		"http:///webhooks/ci": false, "http://h/webhooks/CANARY": false, "http://h/CANARY": false, "ftp://h/webhooks/ci": false, "webhooks/ci": false, "?/webhooks/ci": false, "": false, "*": false,
	} {
		for form, decode := range inBothForms {
			w, err := decode("ci", target)
			if (err == nil) != ok {
				t.Errorf("%s %q: decoded %+v, %v, want accepted %t", form, target, w, err, ok)
			}
			if err != nil && strings.Contains(err.Error(), canary) {
				t.Errorf("%s %q: error quotes the event: %v", form, target, err)
			}
		}
	}
	for _, channel := range []string{"", ".", "..", "*", "c/i", "c%69"} { // no client is of such a channel
		for form, decode := range inBothForms {
			if w, err := decode(channel, "/webhooks/"+channel+"/x"); err == nil {
				t.Errorf("%s, channel %q: decoded %+v", form, channel, w)
			}
		}
	}
}

// TestDecodeDefaults is what the absence of a field or a member means, and how
// far the numbers of a stream are believed.
func TestDecodeDefaults(t *testing.T) {
	const line, path = "PUT /webhooks/ci/x?y HTTP/1.1\nContent-Length: 0\n", "/webhooks/ci/x"
	put := Webhook{ID: testID, Method: "PUT", Path: path, Query: "?y", Time: time.UnixMilli(0)}
	with := func(w Webhook, set func(*Webhook)) Webhook {
		set(&w)
		return w
	}
	for _, tc := range []struct {
		data string
		want Webhook
	}{
		{line + "\n", put},
		{line + "X-Relay-Respond: accept; timeout=5000\n\n", with(put, func(w *Webhook) { w.Mode, w.Timeout = modeAccept, 5*time.Second })},
		{line + "X-Relay-Respond: status;timeout=5000\n\n", with(put, func(w *Webhook) { w.Mode, w.Timeout = modeStatus, 5*time.Second })},
		{line + "x-relay-respond: response ; timeout=9223372036\nX-Relay-Time: 1700000000000\n\n", with(put, func(w *Webhook) { w.Mode, w.Timeout, w.Time = "response ", 0, wireTime })},
		{line + "X-Relay-Respond: response; timeout=2000000000\n\n", with(put, func(w *Webhook) { w.Mode, w.Timeout = modeResponse, maxResponseTimeout })},
		{line + "X-Relay-Respond: response; timeout=-1\nX-Relay-Time: -5\n\n", with(put, func(w *Webhook) { w.Mode, w.Time = modeResponse, time.UnixMilli(-5) })},
		{line + "A: 1\na: 2\nX-Relay-Client: x\nb:\n\n", with(put, func(w *Webhook) { w.Headers = []Header{{"A", []string{"1", "2"}}, {"B", []string{""}}} })},
	} {
		w, err := decodeWebhook("ci", testID, []byte(tc.data))
		if err != nil {
			t.Errorf("%q: %v", tc.data, err)
			continue
		}
		if tc.want.Mode == "response " { // a number beyond 31 bits is as good as none
			tc.want.Timeout = w.Timeout
		}
		sameWebhook(t, w, &tc.want)
	}
	legacy := Webhook{Method: "POST", Path: path, Time: time.UnixMilli(0)}
	for _, tc := range []struct {
		data string
		want Webhook
	}{
		{`{"originalUrl":"/webhooks/ci/x?y"}`, with(legacy, func(w *Webhook) { w.Query = "?y" })},
		{`{"originalUrl":"/webhooks/ci/x","path":"/other","query":{"q":"1"},"method":"get"}`, legacy},
		{`{"originalUrl":"/webhooks/ci/x","id":"a","respond":true,"timeout":5000,"mode":"status"}`, legacy}, // nobody could be answered
		{`{"originalUrl":"/webhooks/ci/x","body":"text","bodyBase64":"/w=="}`, with(legacy, func(w *Webhook) { w.Body = []byte("text") })},
		{`{"originalUrl":"/webhooks/ci/x","body":"[object Object]","timestamp":5}`, with(legacy, func(w *Webhook) { w.Body, w.Time = []byte("[object Object]"), time.UnixMilli(5) })},
		{`{"originalUrl":"/webhooks/ci/x","headers":{"X-a":"1","x-A":"2"}}`, with(legacy, func(w *Webhook) { w.Headers = []Header{{"X-A", []string{"1", "2"}}} })},
	} {
		w, err := decodeLegacy("ci", []byte(tc.data))
		if err != nil {
			t.Errorf("%s: %v", tc.data, err)
			continue
		}
		for i := range w.Headers {
			slices.Sort(w.Headers[i].Values) // names that differ in case alone have no order
		}
		sameWebhook(t, w, &tc.want)
	}
}

// TestDecodeAllocations: what a client must allocate for an event, and a replica
// to deliver one again.
func TestDecodeAllocations(t *testing.T) {
	e := eventOf("github", pushHook())
	m := onlyMessage(t, block(e.chunk))
	if n := testing.AllocsPerRun(100, func() { decodeWebhook("github", m.id, m.data) }); n > 20 {
		t.Errorf("%v allocations to decode an event", n)
	}
	if n := testing.AllocsPerRun(100, func() { e.repeat("REPLICAAAAAAA", 2, "client") }); n > 2 {
		t.Errorf("%v allocations to deliver an event again", n)
	}
}

// reportOf is a as the report on the event id.
func reportOf(id string, a Answer) string {
	var b bytes.Buffer
	a.appendReport(&b, id)
	return b.String()
}

// all wants every report.
func all(string) bool { return true }

// TestReportForm holds the form of reports, and what of them is taken.
func TestReportForm(t *testing.T) {
	const of = "X-Relay-Event-Id: " + testID + "\r\n"
	full := Answer{Status: 201, Headers: []Header{{"Content-Type", []string{"text/plain"}}, {"X-Dup", []string{"a", "b\xe9"}}}, Body: []byte("né\x00\r\n\xff")}
	for _, tc := range []struct {
		name string
		a    Answer
		form string
		want Answer
	}{
		{"full", full, "HTTP/1.1 201 Created\r\nContent-Length: 7\r\nContent-Type: text/plain\r\nX-Dup: a\r\nX-Dup: b\xe9\r\n" + of + "\r\nné\x00\r\n\xff", full},
		{"status", Answer{Status: 404}, "HTTP/1.1 404 Not Found\r\n" + of + "Content-Length: 0\r\n\r\n", Answer{Status: 404}},
		{"no content", Answer{Status: 204}, "HTTP/1.1 204 No Content\r\n" + of + "\r\n", Answer{Status: 204}},
		{"not modified", Answer{Status: 304, Headers: []Header{{"Etag", []string{"e"}}}}, "HTTP/1.1 304 Not Modified\r\nEtag: e\r\n" + of + "\r\n", Answer{Status: 304, Headers: []Header{{"Etag", []string{"e"}}}}},
		{"a status without a name", Answer{Status: 599}, "HTTP/1.1 599 status code 599\r\n" + of + "Content-Length: 0\r\n\r\n", Answer{Status: 599}},
		{"unreachable", Answer{Err: answerUnreachable}, "HTTP/1.1 502 Bad Gateway\r\nX-Relay-Error: unreachable\r\n" + of + "Content-Length: 0\r\n\r\n", Answer{Status: 502, Err: answerUnreachable}},
		{"timeout", Answer{Err: answerTimeout}, "HTTP/1.1 504 Gateway Timeout\r\nX-Relay-Error: timeout\r\n" + of + "Content-Length: 0\r\n\r\n", Answer{Status: 504, Err: answerTimeout}},
		{"cookies stay behind", Answer{Status: 200, Headers: []Header{{"Set-Cookie", []string{"a"}}, {"X-B", []string{"2"}}}},
			"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nX-B: 2\r\n" + of + "Content-Length: 0\r\n\r\n", Answer{Status: 200, Headers: []Header{{"X-B", []string{"2"}}}}},
		{"as large as may be", Answer{Status: 200, Body: make([]byte, answerLimit)}, "HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n" + of + "\r\n" + strings.Repeat("\x00", answerLimit), Answer{Status: 200, Body: make([]byte, answerLimit)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			data := reportOf(testID, tc.a)
			if data != tc.form {
				t.Errorf("report %.200q, want %.200q", data, tc.form)
			}
			list := newReports(iotest.HalfReader(strings.NewReader(data + data)))
			for range 2 {
				id, got, err := list.next(all)
				if err != nil || id != testID {
					t.Fatalf("report on %q: %v", id, err)
				}
				if got.Status != tc.want.Status || got.Err != tc.want.Err || !bytes.Equal(got.Body, tc.want.Body) || fmt.Sprint(got.Headers) != fmt.Sprint(tc.want.Headers) && len(got.Headers)+len(tc.want.Headers) > 0 {
					t.Errorf("read %+v, want %+v", got, tc.want)
				}
			}
			if _, _, err := list.next(all); err != io.EOF {
				t.Errorf("at the end: %v", err)
			}
		})
	}
	// The best of several answers is the one nearest to success.
	order := []Answer{{Status: 204}, {Status: 302}, {Status: 404}, {Status: 503}, {Status: 504, Err: answerTimeout}, {Status: 502, Err: answerUnreachable}}
	for i := 1; i < len(order); i++ {
		if order[i-1].rank() >= order[i].rank() {
			t.Errorf("%+v does not beat %+v", order[i-1], order[i])
		}
	}
}

// TestReportsOfOthers is what another client may report, and what is refused
// with an error that quotes nothing.
func TestReportsOfOthers(t *testing.T) {
	const of = "X-Relay-Event-Id: " + testID + "\r\n"
	const ok, empty = "HTTP/1.1 200 OK\r\n" + of, "Content-Length: 0\r\n\r\n"
	many := strings.Repeat("X-Many: 1\r\n", fieldLimit)
	for _, tc := range []struct {
		name, data string
		want       string // status and body of the answers; empty: refused
	}{
		{"least", ok + empty, "200:"},
		{"bare LF", strings.ReplaceAll(ok+"Content-Length: 2\r\n\r\nhi", "\r", ""), "200:hi"},
		{"no reason", "HTTP/1.1 201\r\n" + of + empty, "201:"},
		{"HTTP/1.0 with a length", "HTTP/1.0 200 OK\r\n" + of + "Content-Length: 2\r\n\r\nhi", "200:hi"},
		{"chunks", ok + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n" + ok + empty, "200:hi 200:"},
		{"several", ok + "Content-Length: 3\r\n\r\none" + "HTTP/1.1 204 x\r\n" + of + "\r\n" + ok + "Content-Length: 5\r\n\r\nthree", "200:one 204: 200:three"},
		{"lower-case names", "HTTP/1.1 200 OK\r\nx-relay-event-id:" + testID + "\r\ncontent-length: 0\r\n\r\n", "200:"},
		{"many fields", ok + many + empty, "200:"},

		{"JSON", `{"status":200,"body":"CANARY"}`, ""},
		{"a request", "POST /CANARY HTTP/1.1\r\n" + of + empty, ""},
		{"no id", "HTTP/1.1 200 OK\r\n" + empty, ""},
		{"an id that is none", "HTTP/1.1 200 OK\r\nX-Relay-Event-Id: CANARY\r\n" + empty, ""},
		{"an id with more behind it", strings.Replace(ok, testID, testID+"A", 1) + empty, ""},
		{"an id in lower case", strings.Replace(ok, testID, strings.ToLower(testID), 1) + empty, ""},
		{"status 101", "HTTP/1.1 101 CANARY\r\n" + of + empty, ""},
		{"status 199", "HTTP/1.1 199 CANARY\r\n" + of + empty, ""},
		{"status 600", "HTTP/1.1 600 CANARY\r\n" + of + empty, ""},
		{"status 999", "HTTP/1.1 999 CANARY\r\n" + of + empty, ""},
		{"status -20", "HTTP/1.1 -20 CANARY\r\n" + of + empty, ""},
		{"unknown error", ok + "X-Relay-Error: CANARY\r\n" + empty, ""},
		{"no length", ok + "\r\nCANARY", ""},
		{"no length, and closed", ok + "Connection: close\r\n\r\nCANARY", ""},
		{"identity", ok + "Transfer-Encoding: identity\r\n\r\nCANARY", ""},
		{"two lengths", ok + "Content-Length: 6\r\nContent-Length: 7\r\n\r\nCANARY", ""},
		{"a negative length", ok + "Content-Length: -6\r\n\r\nCANARY", ""},
		{"cut in the head", ok, ""},
		{"cut in the body", ok + "Content-Length: 9\r\n\r\nCANARY", ""},
		{"cut in a chunk", ok + "Transfer-Encoding: chunked\r\n\r\n9\r\nCANARY", ""},
		{"one good, one cut", ok + empty + ok, "200: "},
		{"line end in a value", ok + "X-A: CANARY\x00\r\n" + empty, ""},
		{"name that is none", ok + "X Y: CANARY\r\n" + empty, ""},
		{"folded", ok + "X-A: 1\r\n CANARY\r\n" + empty, "200:"},
		{"too many fields", ok + many + strings.Repeat("X-A: CANARY\r\n", ownFields) + empty, ""},
		{"too large a head", ok + "X-A: " + strings.Repeat("v", headLimit) + "\r\n" + empty, ""},
		{"65 KiB of fields", ok + strings.Repeat("X-A: "+strings.Repeat("v", 1024)+"\r\n", 65) + empty, ""},
		{"too large a body", ok + "Content-Length: 1048577\r\n\r\n" + strings.Repeat("x", answerLimit+1), ""},
		{"too large a body in chunks", ok + "Transfer-Encoding: chunked\r\n\r\n100001\r\n" + strings.Repeat("x", answerLimit+1) + "\r\n0\r\n\r\n", ""},
		{"endless trailers", ok + "Transfer-Encoding: chunked\r\n\r\n0\r\n" + strings.Repeat("X-A: "+strings.Repeat("v", 1024)+"\r\n", 2048), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, keep := range []bool{true, false} {
				var got []string
				var err error
				for list := newReports(strings.NewReader(tc.data)); err == nil; {
					var id string
					var a Answer
					if id, a, err = list.next(func(string) bool { return keep }); err == nil {
						got = append(got, fmt.Sprintf("%d:%s", a.Status, a.Body))
						if id != testID {
							t.Errorf("report on %q", id)
						}
					}
				}
				want, refused := strings.CutSuffix(tc.want, " ")
				if refused = refused || tc.want == ""; refused != (err != io.EOF) && keep || !refused && err != io.EOF {
					t.Errorf("read %.80q, %v", got, err)
				}
				if strings.Contains(err.Error(), canary) {
					t.Errorf("error quotes the report: %v", err)
				}
				if keep && strings.Join(got, " ") != want {
					t.Errorf("read %.80q, want %q", got, want)
				}
			}
		})
	}
}

// FuzzReports: whatever a client reports is read without a panic and within
// bounds, and what comes out of it is an answer that can be passed on.
func FuzzReports(f *testing.F) {
	for _, a := range []Answer{
		{Status: 200, Headers: []Header{{"Content-Type", []string{"text/plain"}}}, Body: []byte(everyByte)},
		{Status: 204}, {Status: 304}, {Status: 599}, {Err: answerTimeout}, {Err: answerUnreachable},
	} {
		f.Add([]byte(reportOf(testID, a)))
		f.Add([]byte(reportOf(testID, a) + reportOf(testID, a)))
	}
	f.Add([]byte("HTTP/1.1 200 OK\r\nX-Relay-Event-Id: " + testID + "\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-T: 1\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nX-Relay-Event-Id: " + testID + "\r\nContent-Length: 0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		source := bytes.NewReader(data)
		list := newReports(source)
		for before := len(data); ; {
			id, a, err := list.next(all)
			if err != nil {
				break
			}
			left := source.Len() + list.buf.Buffered()
			if left >= before {
				t.Fatalf("a report took %d bytes", before-left)
			}
			before = left
			if replicaOf(id) == "" || a.Status < 200 || a.Status > 599 || len(a.Body) > answerLimit || checkHeaders(a.Headers) != nil {
				t.Fatalf("%q became %q %+v", data, id, a)
			}
			if a.Err != "" && a.Err != answerUnreachable && a.Err != answerTimeout {
				t.Fatalf("error %q", a.Err)
			}
			for _, h := range a.Headers {
				if hopByHop[h.Name] || relaysOwn(h.Name) || h.Name == "Set-Cookie" {
					t.Fatalf("%q brought %q", data, h.Name)
				}
			}
			// It goes on to another replica as it is.
			id2, b, err := newReports(strings.NewReader(reportOf(id, a))).next(all)
			if err != nil || id2 != id || b.rank() != a.rank() || a.Err == "" && (b.Status != a.Status || fmt.Sprint(b.Headers) != fmt.Sprint(a.Headers)) {
				t.Fatalf("%q %+v goes on as %q %+v, %v", id, a, id2, b, err)
			}
		}
	})
}

// counted is how much was read of a report that is as good as endless.
type counted struct {
	piece string
	n     int64
}

func (c *counted) Read(p []byte) (int, error) {
	if c.n > 64<<20 {
		return 0, io.ErrUnexpectedEOF
	}
	n := copy(p, c.piece)
	c.n += int64(n)
	return n, nil
}

// TestReportsAreBounded: a report that never ends is not read much further than
// one may be.
func TestReportsAreBounded(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nX-Relay-Event-Id: " + testID + "\r\n"
	for name, tc := range map[string]struct {
		start, piece string
		limit        int64
	}{
		"line":    {"HTTP/1.1 200 ", "x", headLimit},
		"field":   {ok + "X-A: ", "x", headLimit},
		"fields":  {ok, "X-A: x\r\n", headLimit},
		"chunk":   {ok + "Transfer-Encoding: chunked\r\n\r\nffffffff\r\n", "x", answerLimit + headLimit},
		"chunks":  {ok + "Transfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n", answerLimit + headLimit},
		"trailer": {ok + "Transfer-Encoding: chunked\r\n\r\n0\r\n", "X-A: x\r\n", answerLimit + headLimit},
	} {
		endless := &counted{piece: tc.piece}
		if _, a, err := newReports(io.MultiReader(strings.NewReader(tc.start), endless)).next(all); err == nil {
			t.Errorf("%s: read %+v", name, a)
		}
		if endless.n > tc.limit+8<<10 {
			t.Errorf("%s: %d bytes were read", name, endless.n)
		}
	}
}

func TestIDs(t *testing.T) {
	for range 100 {
		replica := newReplica()
		a, b := newID(replica), newID(replica)
		if a == b || !validName(a) || replicaOf(a) != replica || replicaOf(b) != replica {
			t.Fatalf("ids %q and %q of %q", a, b, replica)
		}
	}
	// Nothing else is of any replica, above all of none with a name that means something else.
	good := newID(testReplica)
	for _, id := range []string{
		"", "-", "x", "all", "all-" + good, "all-" + good[14:], "@all-" + good[14:], testReplica, testReplica + "-", good[14:], good[:len(good)-1], good + "A",
		strings.ToLower(good), strings.Replace(good, "-", "_", 1), strings.Replace(good, "-", "A", 1), good[:20] + "-" + good[21:], good[:20] + "1" + good[21:],
		good[:20] + "8" + good[21:], good[:20] + "\x00" + good[21:], good[:20] + "/" + good[21:], "@" + good[1:], good[:12] + "--" + good[14:], "elsewhere-" + good,
	} {
		if replica := replicaOf(id); replica != "" {
			t.Errorf("replicaOf(%q) = %q", id, replica)
		}
	}
}

// TestBackoff: growth to the cap, jitter within its half, and no overflow
// however long the other side is away.
func TestBackoff(t *testing.T) {
	plain := Backoff{Initial: 100 * time.Millisecond, Max: time.Second, Factor: 3}
	for i, want := range []time.Duration{100, 300, 900, 1000, 1000} {
		if got := plain.Next(); got != want*time.Millisecond {
			t.Errorf("try %d: %v, want %v", i, got, want*time.Millisecond)
		}
	}
	plain.Reset()
	if got := plain.Next(); got != plain.Initial {
		t.Errorf("after Reset: %v", got)
	}
	for _, tc := range []Backoff{
		{Initial: time.Second, Max: 30 * time.Second, Factor: 2, Jitter: true},
		{Initial: time.Millisecond, Max: maxDuration, Factor: 100, Jitter: true},
		{Initial: time.Hour, Max: time.Hour, Factor: 1, Jitter: true},
		{Initial: time.Minute, Max: time.Second, Factor: 2, Jitter: true},
	} {
		grown := math.Min(float64(tc.Initial), float64(tc.Max))
		var low, high bool
		for range 5000 {
			share := float64(tc.Next()) / grown
			if share < 0.499 || share > 1.001 {
				t.Fatalf("%+v: %v of the delay", tc, share)
			}
			low, high = low || share < 0.6, high || share > 0.9
			grown = math.Min(grown*tc.Factor, float64(tc.Max))
		}
		if !low || !high {
			t.Errorf("%+v: jitter does not spread", tc)
		}
	}
}

// The hub.

var wide = Limits{Subscribers: 1000, PerAddress: 1000, Buffer: 1 << 20}

// joined is a subscriber that the hub took. Its Write only says that it was
// called; the test itself calls Take.
func joined(t testing.TB, h *Hub, channel string) *Subscriber {
	t.Helper()
	s := &Subscriber{Channel: channel, Addr: netip.MustParseAddr("192.0.2.1"), Write: func() {}}
	if err := h.Subscribe(s); err != nil {
		t.Fatal(err)
	}
	return s
}

// sized is an event whose chunk has n bytes.
func sized(channel string, n int) *Event {
	e := &Event{ID: strconv.Itoa(n), Channel: channel, chunk: make([]byte, n)}
	e.uses.Store(1)
	return e
}

// took is the ids that Take hands out, until its queue is empty.
func took(s *Subscriber) (ids []string) {
	for batch, _ := s.Take(nil); len(batch) > 0; batch, _ = s.Take(batch) {
		for _, e := range batch {
			ids = append(ids, e.ID)
		}
	}
	return ids
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// empty fails unless nothing at all is kept.
func empty(t testing.TB, h *Hub) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.channels) > 0 || len(h.addresses) > 0 || h.total != 0 {
		t.Errorf("hub keeps %d channels, %d addresses, counts %d subscribers", len(h.channels), len(h.addresses), h.total)
	}
}

func TestHubDelivers(t *testing.T) {
	receipts := 0
	h := &Hub{Limits: wide, OnSignal: func(Signal) { receipts++ }}
	if n, err := h.Publish(t.Context(), sized("a", 10)); n != 0 || err != nil || receipts != 0 {
		t.Errorf("publish to nobody: %d, %v, %d receipts", n, err, receipts)
	}
	empty(t, h)
	s1, s2, other := joined(t, h, "a"), joined(t, h, "a"), joined(t, h, "b")
	if !isClosed(s1.Live) {
		t.Error("a hub of its own is live at once")
	}
	for n := 1; n <= 5; n++ {
		if n, err := h.Publish(t.Context(), sized("a", n)); n != 1 || err != nil {
			t.Errorf("publish: %d, %v, want one replica", n, err)
		}
	}
	for _, s := range []*Subscriber{s1, s2} {
		if got := took(s); !slices.Equal(got, []string{"1", "2", "3", "4", "5"}) {
			t.Errorf("order %q", got)
		}
		if s.bytes != 0 || len(s.queue) != 0 {
			t.Errorf("%d bytes counted, queue %v, after all was taken", s.bytes, s.queue)
		}
	}
	if got := took(other); got != nil {
		t.Errorf("another channel got %q", got)
	}
	if got := h.Delivered.Load(); got != 10 {
		t.Errorf("%d deliveries counted, want 10", got)
	}
	if !slices.Equal(slices.Sorted(slices.Values(h.Channels())), []string{"a", "b"}) || !h.Wants("a") || h.Wants("c") {
		t.Errorf("channels %q", h.Channels())
	}
	h.Leave(s1, errPeerGone)
	h.Leave(s1, errShutdown) // the writer and the reader of a stream both say so
	if reason := h.Reason(s1); reason != errPeerGone {
		t.Errorf("reason %v, want the first", reason)
	}
	if subscribers, channels := h.Count(); subscribers != 2 || channels != 2 {
		t.Errorf("%d subscribers of %d channels", subscribers, channels)
	}
	h.Leave(s2, errPeerGone)
	h.Leave(other, errPeerGone)
	empty(t, h)
	if given := h.Deliver(sized("a", 1)); given != nil || took(s1) != nil {
		t.Error("delivered to who left")
	}
}

// TestHubReceipt: every event that a replica takes makes one receipt for its
// holder, which says to whom it was given; an event may be for one client, or for
// those who can report.
func TestHubReceipt(t *testing.T) {
	var signals []Signal
	h := &Hub{Limits: wide, OnSignal: func(s Signal) { signals = append(signals, s) }}
	one, two := &Subscriber{Channel: "a", Client: "c", Responds: true}, &Subscriber{Channel: "a", Client: "d", Responds: true}
	named, legacy := &Subscriber{Channel: "a", Client: "e"}, &Subscriber{Channel: "a"}
	everybody := []*Subscriber{one, two, named, legacy}
	for _, s := range everybody {
		s.Write = func() {}
		if err := h.Subscribe(s); err != nil {
			t.Fatal(err)
		}
	}
	for i, tc := range []struct {
		only string
		want []*Subscriber
	}{
		{"", everybody}, {onlyReporters, everybody[:2]}, {"c", everybody[:1]}, {"d", everybody[1:2]}, {"e", nil}, {"x", nil}, {one.ID, nil},
	} {
		e := sized("a", i+1)
		e.Holder, e.Round, e.Only = "holder", 3, tc.only
		signals = nil
		if n, err := h.Publish(t.Context(), e); n != 1 || err != nil || len(signals) != 1 {
			t.Fatalf("for %q: %d replicas, %v, signals %+v", tc.only, n, err, signals)
		}
		sig := signals[0]
		if sig.Kind != signalReceipt || sig.To != "holder" || sig.Event != e.ID || sig.Round != 3 {
			t.Errorf("signal %+v", sig)
		}
		want := map[Given]bool{}
		for _, s := range tc.want {
			client := ""
			if s.Responds {
				client = s.Client
			}
			want[Given{s.ID, client}] = true
		}
		got := map[Given]bool{}
		for _, g := range sig.Given {
			got[g] = true
		}
		if !maps.Equal(got, want) || len(sig.Given) != len(want) {
			t.Errorf("for %q: given to %+v, want %+v", tc.only, sig.Given, want)
		}
		for _, s := range everybody {
			if ids := took(s); len(ids) > 0 != slices.Contains(tc.want, s) {
				t.Errorf("for %q: %+v got %q", tc.only, s.Client, ids)
			}
		}
	}
	signals = nil
	if n, _ := h.Publish(t.Context(), sized("nobody's", 1)); n != 0 || signals != nil {
		t.Error("a receipt for an event that nobody took")
	}
	if n, err := h.Send(t.Context(), Signal{Kind: signalReady}); n != 1 || err != nil || len(signals) != 1 {
		t.Errorf("signal to itself: %d, %v", n, err)
	}
	if h.Tell(Signal{Kind: signalLeft}); len(signals) != 2 {
		t.Error("what was told was not heard")
	}
}

// TestHubBounds: bytes bound a queue, and a batch that is being written counts
// until the next Take. Who is full is not given an event and stays; with half of
// its space free it says so, once.
func TestHubBounds(t *testing.T) {
	h := &Hub{Limits: Limits{Subscribers: 9, PerAddress: 9, Buffer: 100}}
	slow, quick := joined(t, h, "a"), joined(t, h, "a")
	deliver := func(size, want int, full int64) {
		t.Helper()
		if given := h.Deliver(sized("a", size)); len(given) != want || h.Full.Load() != full {
			t.Errorf("%d bytes were given to %d and found %d full, want %d and %d", size, len(given), h.Full.Load(), want, full)
		}
	}
	take := func(s *Subscriber, want int, space bool) {
		t.Helper()
		if batch, got := s.Take(nil); len(batch) != want || got != space {
			t.Errorf("took %d, space: %t, want %d, %t", len(batch), got, want, space)
		}
	}
	deliver(5000, 2, 0) // an empty queue takes any one event
	take(quick, 1, false)
	if quick.bytes != 5000 {
		t.Errorf("%d bytes counted while the batch is written", quick.bytes)
	}
	take(quick, 0, false)
	deliver(60, 1, 1)
	deliver(40, 1, 2) // full to the byte
	deliver(1, 0, 4)
	if quick.bytes != 100 {
		t.Errorf("%d bytes counted", quick.bytes)
	}
	take(quick, 2, false) // what is being written counts
	deliver(1, 0, 6)
	take(quick, 0, true)
	take(quick, 0, false) // it was said
	deliver(30, 1, 7)
	deliver(71, 0, 9)
	take(quick, 1, true) // with half of the space free, though something is queued
	take(quick, 0, false)
	if h.Reason(slow) != nil || h.Reason(quick) != nil || h.Evicted.Load() != 0 {
		t.Errorf("who is full was evicted: %v, %v", h.Reason(slow), h.Reason(quick))
	}
	h.Leave(slow, errPeerGone)
	h.Leave(quick, errPeerGone)
	empty(t, h)
	beaten := joined(t, h, "a")
	for range 100 { // heartbeats are the relay's own, and nobody's backlog
		h.Push(beaten, heartbeatEvent)
	}
	if given := h.Deliver(sized("a", 5000)); len(given) != 1 || len(took(beaten)) != 101 || beaten.bytes != 0 {
		t.Errorf("behind heartbeats an event was refused: %d bytes", beaten.bytes)
	}
}

// TestHeldLeavesSpace: although what is held takes the whole budget, a subscriber
// with nothing queued is given one event, and the next when it has taken that.
func TestHeldLeavesSpace(t *testing.T) {
	h := &Hub{Limits: wide, Budget: &Budget{Limit: 1000}}
	held, _ := h.Budget.claim("a", 500)
	h.Budget.claim("b", 500)
	s := joined(t, h, "a")
	for n := 1; n <= 3; n++ {
		e := sized("a", n)
		if given := h.Deliver(e); len(given) != 1 {
			t.Fatalf("event %d was given to %d", n, len(given))
		}
		if given := h.Deliver(sized("a", 100+n)); len(given) != 0 || !s.missed {
			t.Errorf("a second one was given to %d, missed is %v", len(given), s.missed)
		}
		if got := took(s); !slices.Equal(got, []string{strconv.Itoa(n)}) {
			t.Errorf("took %q", got)
		}
		e.release() // its maker's
		e.release() // the stream's
	}
	held.end()
	if used := h.Budget.Used(); used != 500 {
		t.Errorf("%d bytes are used in the end", used)
	}
}

// TestHubDropsWhatIsOver: an event whose sender has been answered leaves the
// queue without being written.
func TestHubDropsWhatIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &Hub{Limits: wide}
		s := joined(t, h, "a")
		for n, left := range []time.Duration{0, time.Second, time.Minute, time.Second} {
			e := sized("a", n+1)
			if left > 0 {
				e.Until = time.Now().Add(left)
			}
			h.Deliver(e)
		}
		time.Sleep(2 * time.Second)
		if got := took(s); !slices.Equal(got, []string{"1", "3"}) || s.bytes != 0 || len(s.queue) != 0 {
			t.Errorf("took %q, %d bytes are counted", got, s.bytes)
		}
	})
}

// TestHubTake: a batch ends at the burst, but never before its first event.
func TestHubTake(t *testing.T) {
	h := &Hub{Limits: Limits{Subscribers: 9, PerAddress: 9, Buffer: 1 << 30}}
	s := joined(t, h, "a")
	for _, n := range []int{burst + 1, burst / 2, burst / 2, 1, burst, 2} {
		h.Deliver(sized("a", n))
	}
	var batch []*Event
	var sizes [][]int
	total := s.bytes
	for batch, _ = s.Take(batch); len(batch) > 0; batch, _ = s.Take(batch) {
		var list []int
		for _, e := range batch {
			list = append(list, len(e.chunk))
			total -= int64(len(e.chunk))
		}
		sizes = append(sizes, list)
	}
	want := fmt.Sprint([][]int{{burst + 1}, {burst / 2, burst / 2}, {1}, {burst}, {2}})
	if fmt.Sprint(sizes) != want || total != 0 || s.bytes != 0 || s.batch != 0 {
		t.Errorf("batches %v, want %v; %d bytes over, %d and %d counted", sizes, want, total, s.bytes, s.batch)
	}
}

func TestHubLimits(t *testing.T) {
	h := &Hub{Limits: Limits{Subscribers: 3, PerAddress: 2, Buffer: 1}}
	try := func(addr, channel string) (*Subscriber, error) {
		s := &Subscriber{Channel: channel, Addr: netip.MustParseAddr(addr), Write: func() {}}
		return s, h.Subscribe(s)
	}
	a1, _ := try("192.0.2.1", "a")
	a2, _ := try("192.0.2.1", "b")
	if _, err := try("192.0.2.1", "c"); err != errPerAddress {
		t.Errorf("third of one address: %v", err)
	}
	b, err := try("192.0.2.2", "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := try("192.0.2.3", "c"); err != errSubscribers {
		t.Errorf("one too many: %v", err)
	}
	if h.Wants("c") {
		t.Error("a channel is kept for a subscriber that was refused")
	}
	h.Leave(a1, errPeerGone)
	h.Leave(a1, errPeerGone) // must not make space twice
	a3, err := try("192.0.2.1", "c")
	if err != nil {
		t.Errorf("the place of who left: %v", err)
	}
	if _, err := try("192.0.2.1", "d"); err == nil {
		t.Error("leaving twice made space twice")
	}
	for _, s := range []*Subscriber{a2, a3, b} {
		h.Leave(s, errPeerGone)
	}
	empty(t, h)
	if err := new(Hub).Subscribe(&Subscriber{}); err == nil {
		t.Error("a hub without limits took a subscriber")
	}
}

// TestHubShares: one channel has at most half of all subscribers, so that who
// has its token does not keep out the others; in IPv6 a /64 is one address.
func TestHubShares(t *testing.T) {
	for _, tt := range []struct{ subscribers, share int }{{1, 1}, {2, 1}, {3, 2}, {50, 25}, {51, 26}} {
		h := &Hub{Limits: Limits{Subscribers: tt.subscribers, PerAddress: 1000, Buffer: 1}}
		var all []*Subscriber
		try := func(channel string, want error) {
			t.Helper()
			s := &Subscriber{Channel: channel, Addr: netip.MustParseAddr("192.0.2.1"), Write: func() {}}
			if err := h.Subscribe(s); err != want {
				t.Fatalf("of %d, number %d of channel %s: %v, want %v", tt.subscribers, len(all)+1, channel, err, want)
			} else if err == nil {
				all = append(all, s)
			}
		}
		for range tt.share {
			try("a", nil)
		}
		if tt.subscribers > tt.share {
			try("a", errPerChannel)
			try("a", errPerChannel)
		}
		for range tt.subscribers - tt.share {
			try("b", nil)
		}
		try("b", errSubscribers)
		try("c", errSubscribers)
		if h.Wants("c") {
			t.Error("a channel is kept for a subscriber that was refused")
		}
		h.Leave(all[0], errPeerGone)
		try("a", nil)
		for _, s := range all {
			h.Leave(s, errPeerGone)
		}
		empty(t, h)
	}

	h := &Hub{Limits: Limits{Subscribers: 100, PerAddress: 2, Buffer: 1}}
	var all []*Subscriber
	for _, tt := range []struct {
		addr string
		want error
	}{
		{"2001:db8::1", nil}, {"2001:db8::2", nil}, {"2001:db8::3", errPerAddress}, {"2001:db8:0:0:ffff:ffff:ffff:ffff", errPerAddress}, {"2001:db8::1%eth0", errPerAddress},
		{"2001:db8:0:1::1", nil}, {"2001:db8:0:1::1", nil}, {"2001:db8:0:1::1", errPerAddress},
		{"192.0.2.1", nil}, {"::ffff:192.0.2.1", nil}, {"192.0.2.1", errPerAddress}, {"::ffff:192.0.2.1", errPerAddress}, {"192.0.2.2", nil},
	} {
		s := &Subscriber{Channel: "c" + tt.addr[:3], Addr: netip.MustParseAddr(tt.addr), Write: func() {}}
		if err := h.Subscribe(s); err != tt.want {
			t.Errorf("%s: %v, want %v", tt.addr, err, tt.want)
		} else if err == nil {
			all = append(all, s)
		}
	}
	for _, s := range all {
		h.Leave(s, errPeerGone)
	}
	empty(t, h)
}

// TestHubLive: behind a bus a subscriber is live once its channel is
// confirmed, and the bus hears of the first and the last subscriber.
func TestHubLive(t *testing.T) {
	var watched []string
	h := &Hub{Limits: wide, Watch: func(channel string) { watched = append(watched, channel) }}
	first := joined(t, h, "a")
	h.Confirm("b") // nobody's, or of a moment ago
	if isClosed(first.Live) {
		t.Fatal("live before the bus confirmed")
	}
	if given := h.Deliver(sized("a", 1)); len(given) != 1 {
		t.Error("events queue from the beginning")
	}
	h.Confirm("a")
	h.Confirm("a")
	if !isClosed(first.Live) {
		t.Fatal("not live after the bus confirmed")
	}
	second := joined(t, h, "a")
	if !isClosed(second.Live) {
		t.Error("a channel that is live is live for all")
	}
	h.Suspend()
	third := joined(t, h, "a")
	if isClosed(third.Live) {
		t.Error("live while the bus is down")
	}
	if !isClosed(first.Live) {
		t.Error("an outage takes ready back")
	}
	h.Confirm("a")
	if !isClosed(third.Live) {
		t.Error("not live after the outage")
	}
	if !slices.Equal(watched, []string{"a"}) {
		t.Errorf("watched %q, want the first subscriber alone", watched)
	}
	reason := errors.New("a reason of its own")
	h.Leave(second, reason)
	if h.Reason(second) != reason || h.Reason(first) != nil {
		t.Error("evicted the wrong one")
	}
	h.Leave(first, errPeerGone)
	h.Leave(third, errPeerGone)
	if !slices.Equal(watched, []string{"a", "a"}) {
		t.Errorf("watched %q, want the last subscriber too", watched)
	}
	empty(t, h)
	if fourth := joined(t, h, "a"); isClosed(fourth.Live) {
		t.Error("a channel that was given up counts as live")
	}
}

// TestHubWrites: whoever queues an event while nobody writes starts the
// writer, and only then; a stream ends at once, or with its queue.
func TestHubWrites(t *testing.T) {
	h := &Hub{Limits: wide}
	var writes, aborts atomic.Int32
	s := &Subscriber{Channel: "a", Write: func() { writes.Add(1) }}
	if err := h.Subscribe(s); err != nil {
		t.Fatal(err)
	}
	h.Attach(s, func() { aborts.Add(1) })
	count := func(what string, want int32) {
		t.Helper()
		if s.Writers.Wait(); writes.Load() != want {
			t.Errorf("%s: %d writers, want %d", what, writes.Load(), want)
		}
	}
	h.Deliver(sized("a", 1))
	count("before the stream has begun", 0)
	took(s)
	h.Deliver(sized("a", 2))
	h.Deliver(sized("a", 3))
	count("two events", 1)
	h.Finish(s, errStreamAge)
	h.Deliver(sized("a", 4))
	if h.Reason(s) != nil || aborts.Load() != 0 {
		t.Errorf("ended with %v before its queue was written", h.Reason(s))
	}
	if got := took(s); !slices.Equal(got, []string{"2", "3", "4"}) || h.Reason(s) != errStreamAge || aborts.Load() != 1 {
		t.Errorf("took %q, then ended with %v, aborted %d times", got, h.Reason(s), aborts.Load())
	}
	if h.Push(s, heartbeatEvent) {
		t.Error("a heartbeat for a stream that has ended")
	}
	h.Leave(s, errShutdown)
	count("after the end", 1)
	empty(t, h)

	idle, busy, late := joined(t, h, "a"), joined(t, h, "a"), joined(t, h, "a")
	took(idle)
	if got := len(h.Subscribers()); got != 3 {
		t.Errorf("%d subscribers listed", got)
	}
	for _, s := range h.Subscribers() {
		h.Finish(s, errShutdown)
	}
	if h.Reason(idle) != errShutdown || h.Reason(busy) != nil {
		t.Errorf("idle stream: %v, one that is being written: %v", h.Reason(idle), h.Reason(busy))
	}
	if !h.Push(busy, heartbeatEvent) || len(took(busy)) != 1 || h.Reason(busy) != errShutdown {
		t.Errorf("a stream that finishes: %v", h.Reason(busy))
	}
	h.Leave(late, errPeerGone)
	h.Attach(late, func() { aborts.Add(1) })
	if aborts.Load() != 2 {
		t.Error("a connection was given to a stream that had ended, and stays")
	}
	empty(t, h)
}

// TestStuck: a probe must tell a stuck hub, or server, from a busy one, and not hang
// with it.
func TestStuck(t *testing.T) {
	h, s := &Hub{}, &Server{}
	for _, tt := range []struct {
		mu    *sync.Mutex
		alive func(context.Context) error
	}{{&h.mu, h.Check}, {&s.mu, s.Alive}} {
		synctest.Test(t, func(t *testing.T) {
			check := func() error {
				ctx, cancel := context.WithTimeout(t.Context(), checkTimeout)
				defer cancel()
				return tt.alive(ctx)
			}
			tt.mu.Lock()
			time.AfterFunc(time.Second, tt.mu.Unlock)
			if err := check(); err != nil {
				t.Errorf("busy: %v", err)
			}
			tt.mu.Lock()
			began := time.Now()
			if err := check(); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > checkTimeout+time.Second {
				t.Errorf("stuck: %v after %v", err, time.Since(began))
			}
			tt.mu.Unlock()
			if err := check(); err != nil {
				t.Errorf("after it: %v", err)
			}
		})
	}
}

// TestEventsKeepWhatTheyCount makes large events give their memory back and
// small ones be kept: budgets count the bytes that are used.
func TestEventsKeepWhatTheyCount(t *testing.T) {
	large, small := strings.Repeat("a", 40<<10), []byte("{}")
	for _, mode := range []string{modeAccept, modeStatus} {
		var kept []*Event
		counted := 0
		for range 1000 {
			eventOf("a", &Webhook{ID: "x", Method: "POST", Path: "/", Body: []byte(large)}).release()
			e := eventOf("b", &Webhook{ID: "x", Method: "POST", Path: "/", Body: small, Mode: mode})
			kept = append(kept, e)
			counted += len(e.wire)
		}
		used := 0
		for _, e := range kept {
			used += cap(e.wire)
		}
		if used > 8*counted { // mostly space for the head of an event
			t.Errorf("%s: %d bytes are used, %d counted", mode, used, counted)
		}
	}
}

// TestHubHammer lets everything happen at once. Each channel has one
// publisher, so its subscribers must see its numbers in their order, and all
// that they were given.
func TestHubHammer(t *testing.T) {
	h := &Hub{Limits: Limits{Subscribers: 50, PerAddress: 40, Buffer: 4000}, Watch: func(string) {}}
	channels := []string{"a", "b", "c"}
	publishing := make(chan struct{})
	var revoked, given, seen atomic.Int64
	var publishers, others sync.WaitGroup
	deadline := time.Now().Add(patience)
	for _, channel := range channels {
		publishers.Go(func() {
			for n := 0; n < 3000 || (revoked.Load() == 0 || h.Full.Load() == 0) && time.Now().Before(deadline); n++ {
				e := sized(channel, 1+mathrand.N(200))
				e.ID = strconv.Itoa(n)
				given.Add(int64(len(h.Deliver(e))))
				e.release()
			}
		})
		others.Go(func() {
			for !isClosed(publishing) {
				h.Confirm(channel)
				if mathrand.N(10) == 0 {
					h.Suspend()
				}
				for _, s := range h.Subscribers() {
					if mathrand.N(100) == 0 {
						h.Leave(s, errRevoked)
					}
				}
				time.Sleep(100 * time.Microsecond)
			}
		})
	}
	subscribe := func(addr netip.Addr) {
		for !isClosed(publishing) {
			s := &Subscriber{Channel: channels[mathrand.N(len(channels))], Addr: addr}
			last, under := -1, atomic.Int32{}
			s.Write = func() {
				for batch, _ := s.Take(nil); len(batch) > 0; batch, _ = s.Take(batch) {
					if under.Add(1) > 1 {
						t.Error("two writers at once")
					}
					for _, e := range batch {
						n, _ := strconv.Atoi(e.ID)
						if n <= last {
							t.Errorf("%d came after %d", n, last)
						}
						last = n
						seen.Add(1)
						e.release()
					}
					if mathrand.N(50) == 0 {
						time.Sleep(time.Millisecond) // a slow network
					}
					under.Add(-1)
				}
			}
			if h.Subscribe(s) != nil {
				runtime.Gosched()
				continue // the limits are meant to be met
			}
			gone := make(chan struct{})
			h.Attach(s, func() { close(gone) })
			s.Write()
			select {
			case <-gone:
			case <-time.After(time.Duration(mathrand.N(20)) * time.Millisecond):
			}
			switch mathrand.N(3) {
			case 0:
				h.Finish(s, errStreamAge)
				<-gone
			default:
				h.Leave(s, errPeerGone)
			}
			s.Writers.Wait()
			if h.Reason(s) == errRevoked {
				revoked.Add(1)
			}
		}
	}
	for i := range 60 {
		others.Go(func() { subscribe(netip.AddrFrom4([4]byte{192, 0, 2, byte(i % 2)})) })
	}
	publishers.Wait()
	h.mu.Lock()
	count := 0
	for _, c := range h.channels {
		count += len(c.subscribers)
		for s := range c.subscribers {
			queued := s.batch
			for _, e := range s.queue {
				queued += int64(len(e.chunk))
			}
			if queued != s.bytes || s.bytes > h.Limits.Buffer || s.reason != nil {
				t.Errorf("subscriber counts %d bytes and has %d; %v", s.bytes, queued, s.reason)
			}
		}
	}
	if count != h.total {
		t.Errorf("hub counts %d subscribers and has %d", h.total, count)
	}
	h.mu.Unlock()
	close(publishing)
	others.Wait()
	empty(t, h)
	if revoked.Load() == 0 || h.Full.Load() == 0 {
		t.Errorf("%d revoked, %d found full: the hammer is too soft", revoked.Load(), h.Full.Load())
	}
	if n := h.Delivered.Load(); n != given.Load() || seen.Load() > n || seen.Load() == 0 {
		t.Errorf("%d counted, %d given, %d seen", n, given.Load(), seen.Load())
	}
}

// Benchmarks.

// pushHook is a GitHub push of 10 KiB as it was captured.
func pushHook() *Webhook {
	return &Webhook{
		ID: newID(testReplica), Method: "POST", Path: "/webhooks/github/push", Query: "?x=1", Body: githubBody(10 << 10), Time: wireTime,
		Headers: endToEnd(headersOf("Accept: */*\nContent-Type: application/json\nUser-Agent: GitHub-Hookshot/044aadd\nX-GitHub-Delivery: 72d3162e-cc78-11e3-81ab-4c9367dc0958\nX-GitHub-Event: push\nX-GitHub-Hook-ID: 292430182\nX-Hub-Signature-256: sha256=d57c68ca6f92289e6987922ff26938930f6e66a2d161ef06abdf1859230aa23c")),
	}
}

// plainHook is a webhook as a program would write it that uses JSON.
type plainHook struct {
	ID          string            `json:"id"`
	Method      string            `json:"method"`
	OriginalURL string            `json:"originalUrl"`
	Path        string            `json:"path"`
	Query       map[string]string `json:"query"`
	Headers     map[string]string `json:"headers"`
	Body        string            `json:"body"`
	Timestamp   int64             `json:"timestamp"`
}

func times(n int, f func()) func() {
	return func() {
		for range n {
			f()
		}
	}
}

// plainOf is w as such a program would have it.
func plainOf(w *Webhook) plainHook {
	plain := plainHook{
		ID: w.ID, Method: w.Method, OriginalURL: w.Path + w.Query, Path: w.Path, Query: map[string]string{"x": "1"},
		Headers: map[string]string{"content-length": strconv.Itoa(len(w.Body))}, Body: string(w.Body), Timestamp: w.Time.UnixMilli(),
	}
	for _, h := range w.Headers {
		plain.Headers[strings.ToLower(h.Name)] = h.Values[0]
	}
	return plain
}

// BenchmarkEncode: the form of an event, beside encoding/json: 1.4 and 18 µs.
func BenchmarkEncode(b *testing.B) {
	w := pushHook()
	plain := plainOf(w)
	duel(b, "event", 200, times(200, func() { eventOf("github", w).release() }), times(200, func() { json.Marshal(plain) }))
}

// BenchmarkDecode: one event as the client reads it, beside encoding/json
// alone, without the checks: 4.3 and 56 µs.
func BenchmarkDecode(b *testing.B) {
	e := eventOf("github", pushHook())
	m, legacy := onlyMessage(b, block(e.chunk)), onlyMessage(b, block(e.chunkFor(false)))
	duel(b, "event", 100, times(100, func() {
		if _, err := decodeWebhook("github", m.id, m.data); err != nil {
			b.Fatal(err)
		}
	}), times(100, func() {
		var plain plainHook
		json.Unmarshal(legacy.data, &plain)
	}))
}

// BenchmarkHubPublish: one event to 1 and to 500 subscribers, who take it,
// beside a send to as many Go channels.
func BenchmarkHubPublish(b *testing.B) {
	for _, n := range []int{1, 500} {
		b.Run(fmt.Sprintf("subscribers=%d", n), func(b *testing.B) {
			h := &Hub{Limits: wide}
			subscribers := make([]*Subscriber, n)
			queues := make([]chan *Event, n)
			for i := range n {
				subscribers[i], queues[i] = joined(b, h, "a"), make(chan *Event, 1)
			}
			e := sized("a", 1024)
			h.OnSignal = func(Signal) {}
			var batch []*Event
			duel(b, "event", 100, times(100, func() {
				h.Publish(context.Background(), e)
				for _, s := range subscribers {
					batch, _ = s.Take(batch)
				}
			}), times(100, func() {
				for _, q := range queues {
					q <- e
				}
				for _, q := range queues {
					<-q
				}
			}))
		})
	}
}
